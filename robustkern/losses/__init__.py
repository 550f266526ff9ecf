"""Losses for robust training.  Each takes (model, x, y) and returns `Terms(orientation, smoothness, weight)`."""

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
    "ALP",
    "AWP",
    "AdversarialTraining",
    "CURE",
    "CrossEntropy",
    "CrossLipschitz",
    "Distillation",
    "FisherPenalty",
    "GradAlign",
    "GradientPenalty",
    "JacobianPenalty",
    "LabelSmoothing",
    "Lazy",
    "LocalLinearity",
    "MART",
    "TRADES",
    "VAT",
]
