"""Lazy regularisation: the smoothness term on some of the steps only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustkern.draw import Draw
from robustkern.losses.awp import AWP
from robustkern.losses.cross_entropy import CrossEntropy
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class Lazy(Loss):
    """total = orientation + every * weight * smoothness on one step of `every`, the orientation alone on the others.

    orientation and smoothness: those of the loss; the mean over the steps is the loss's own.  A penalty of n
    passes costs 3 + (n - 3) / every passes per step.  In return, parameter gradients vary more, and on penalised steps
    they grow with `every`: learning rate and clipping must tolerate that.

    Args:
        loss: its smoothness should be expensive, its orientation a mean cross-entropy at x: `GradientPenalty`,
            `CURE`, `LocalLinearity`, `VAT`, `JacobianPenalty`, `FisherPenalty`, `CrossLipschitz`.
        every: penalise one step of so many, beginning with the first.
        orientation: the loss on the other steps; None: the cross-entropy with the label smoothing of the loss.

    The call takes what the loss takes, and a draw that says which step it is: without one it raises a ValueError unless
    every = 1, since every call would be penalised.  On a step without penalty, its Terms have smoothness and weight 0.
    An `AWP` inside perturbs the weights on the penalised steps, one around it on all.  BatchNorm, derivatives: those of
    the loss.  Source: Karras et al., Analyzing and improving the image quality of StyleGAN, CVPR 2020, appendix B (lazy
    regularisation).

    >>> loss = rk.losses.Lazy(rk.losses.GradientPenalty(weight=1.0), every=4)
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> [loss(model, x, y, rk.Draw(step=step)).weight for step in range(5)]
    [4.0, 0.0, 0.0, 0.0, 4.0]
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
            options: dict[str, Any] = {
                name: getattr(inner, name) for name in ("label_smoothing", "impl") if hasattr(inner, name)
            }
            object.__setattr__(self, "orientation", CrossEntropy(**options))

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        if draw.step is None and self.every > 1:
            raise ValueError("Lazy: draw must say which step this is, such as robustkern.Draw(step=3), got none")
        if (draw.step or 0) % self.every:
            assert self.orientation is not None  # for mypy
            orientation = self.orientation(model, x, y, draw).total
            return Terms(orientation, orientation.new_zeros(()), 0.0)
        terms = self.loss(model, x, y, draw)
        return terms._replace(weight=terms.weight * self.every)
