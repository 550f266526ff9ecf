"""Lazy regularisation: the smoothness term on some of the steps only."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustkern.draw import Draw
from robustkern.losses.awp import AWP
from robustkern.losses.cross_entropy import CrossEntropy
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class Lazy(Loss):
    """total = orientation + every * weight * smoothness on one step of `every`, the orientation alone on the others.

    orientation and smoothness: those of the loss; the mean over the steps is the loss's own.  A penalty that takes n
    passes costs 3 + (n - 3) / every of them a step: gradients of the parameters vary more, and their size on the steps
    that are penalised grows with `every`, which learning rate and clipping must bear.

    Args:
        loss: whose smoothness is worth saving, and whose orientation is a mean cross-entropy at x: `GradientPenalty`,
            `CURE`, `LocalLinearity`, `VAT`, `JacobianPenalty`, `FisherPenalty`, `CrossLipschitz`.
        every: penalise one step of so many, the first of them first.
        orientation: the loss on the other steps; None: the cross-entropy with the label smoothing of the loss.

    The call takes what the loss takes, and a draw that says which step it is: without one every call would be the
    first of `every`, so it raises a ValueError unless every = 1.  Its Terms have smoothness 0 and weight 0 where a step
    is not penalised.  An `AWP` inside perturbs the weights where a step is penalised, one around it perturbs them on
    all.  BatchNorm, derivatives: those of the loss.  Source: Karras et al., Analyzing and improving the image quality
    of StyleGAN, CVPR 2020, appendix B (lazy regularisation).
    """

    loss: Callable[..., Terms]
    every: int
    orientation: Callable[..., Terms] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orientation is None:
            inner = self.loss
            while isinstance(inner, (AWP, Lazy)):
                inner = inner.loss
            smoothing, impl = getattr(inner, "label_smoothing", 0.0), getattr(inner, "impl", "auto")
            object.__setattr__(self, "orientation", CrossEntropy(smoothing, impl=impl))

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        if draw.step is None and self.every > 1:
            raise ValueError("Lazy: draw must say which step this is, such as robustkern.Draw(step=3), got none")
        if (draw.step or 0) % self.every:
            assert self.orientation is not None  # for mypy
            orientation = self.orientation(model, x, y, draw).total
            return Terms(orientation, orientation.new_zeros(()), 0.0)
        terms = self.loss(model, x, y, draw)
        return terms._replace(weight=terms.weight * self.every)
