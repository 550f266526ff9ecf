"""Losses for robust training.  Each takes (model, x, y) and returns `Terms(orientation, smoothness, weight)`."""

from robustkern.losses.cross_entropy import CrossEntropy
from robustkern.losses.gradient_penalty import GradientPenalty

__all__ = ["CrossEntropy", "GradientPenalty"]
