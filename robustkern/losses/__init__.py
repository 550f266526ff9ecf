"""Losses for robust training.  Each takes (model, x, y) and returns `Terms(orientation, smoothness, weight)`."""

from robustkern.losses.cross_entropy import CrossEntropy
from robustkern.losses.cross_lipschitz import CrossLipschitz
from robustkern.losses.fisher_penalty import FisherPenalty
from robustkern.losses.gradient_penalty import GradientPenalty
from robustkern.losses.jacobian_penalty import JacobianPenalty

__all__ = [
    "CrossEntropy",
    "CrossLipschitz",
    "FisherPenalty",
    "GradientPenalty",
    "JacobianPenalty",
]
