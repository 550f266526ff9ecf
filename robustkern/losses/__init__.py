"""Losses for robust training: frozen dataclasses, called as `loss(model, x, y, draw=None) -> Terms`.

The model is any callable that gives logits [B, C >= 2]; y are classes of any integer dtype.  Both terms are means over
the batch of a per-sample quantity, so the weight between them depends neither on the batch size nor on the number of
processes.  A loss keeps no state: its random numbers, step and rows come from a `robustkern.Draw`.

Wrong arguments raise a TypeError or ValueError of one sentence.  Values of x and y are checked on the CPU; on a GPU,
where reading them means waiting, only losses with an attack inside check them.

In training mode, all passes of one call draw the same random numbers from PyTorch's generators, such as dropout's
masks, so that a loss compares outputs of one function.  The generators end as after one pass.  This does not cover
Python's and NumPy's generators, nor a step that torch.compile traces or a CUDA graph captures.
"""

from robustkern.losses.adversarial_training import AdversarialTraining
from robustkern.losses.alp import ALP
from robustkern.losses.awp import AWP
from robustkern.losses.cross_entropy import CrossEntropy
from robustkern.losses.cross_lipschitz import CrossLipschitz
from robustkern.losses.cure import CURE
from robustkern.losses.distillation import Distillation
from robustkern.losses.fisher_penalty import FisherPenalty
from robustkern.losses.grad_align import GradAlign
from robustkern.losses.gradient_penalty import GradientPenalty
from robustkern.losses.jacobian_penalty import JacobianPenalty
from robustkern.losses.label_smoothing import LabelSmoothing
from robustkern.losses.lazy import Lazy
from robustkern.losses.local_linearity import LocalLinearity
from robustkern.losses.mart import MART
from robustkern.losses.trades import TRADES
from robustkern.losses.vat import VAT

__all__ = [  # noqa: RUF022 - as sorted() has it
    "ALP", "AWP", "AdversarialTraining", "CURE", "CrossEntropy", "CrossLipschitz", "Distillation", "FisherPenalty",
    "GradAlign", "GradientPenalty", "JacobianPenalty", "LabelSmoothing", "Lazy", "LocalLinearity", "MART", "TRADES",
    "VAT",
]  # fmt: skip
