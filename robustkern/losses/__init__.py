"""Losses for robust training: frozen dataclasses, called as `loss(model, x, y, draw=None) -> Terms`.

The model is any callable that gives logits [B, C >= 2]; y are classes of any integer dtype.  Both terms are means over
the batch of a per-sample quantity, so the weight between them depends neither on the batch size nor on the number of
processes.  A loss remembers nothing: its random numbers, the step and the rows are those of a `robustkern.Draw`.

What makes no sense is a TypeError or ValueError of one sentence; numbers in x and y are looked at on the CPU, where
nothing is waited for, and on a GPU by losses with an attack inside.

In training mode all passes of one call draw the same random numbers from PyTorch's generators, so that what a loss
compares is one function: dropout with the same masks.  The generators end as after one pass.  Random numbers of Python
or NumPy are out of reach, and in a step that torch.compile traces or a CUDA graph captures each pass draws its own.
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
