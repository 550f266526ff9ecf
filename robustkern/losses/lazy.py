"""Lazy regularisation: the smoothness term on some of the steps only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robustkern._options import check_options
from robustkern.losses._wrapper import Loss, Wrapper
from robustkern.losses.cross_entropy import CrossEntropy
from robustkern.terms import Terms


@dataclass(eq=False)
class Lazy(Wrapper):
    """total = orientation + every * weight * smoothness on one call of `every`, the orientation alone on the others.

    orientation and smoothness: those of the loss; the mean over the calls is the loss's own.  A penalty that takes n
    passes costs 3 + (n - 3) / every of them a step: gradients of the parameters vary more, and their size on the steps
    that are penalised grows with `every`, which learning rate and clipping must bear.

    Args:
        loss: whose smoothness is worth saving, and whose orientation is a mean cross-entropy at x: `GradientPenalty`,
            `CURE`, `LocalLinearity`, `VAT`.  The Jacobian's penalties have an `every` of their own.
        every: penalise one call of so many, the first of them first.
        orientation: the loss on the other calls; None: the cross-entropy with the label smoothing of the loss.
        step: calls so far, which `every` goes by; restored, or set for each step as `robustkern train` does, it makes
            a resumed training end in the same bits.

    `generator` and `shard` are those of the loss.  An `AWP` inside perturbs the weights where a step is penalised, one
    around it perturbs them on all.  The call takes what the loss takes.  Its Terms have smoothness 0 and
    weight 0 where a step is not penalised.  BatchNorm, errors, derivatives: those of the loss.  Source: Karras et al.,
    Analyzing and improving the image quality of StyleGAN, CVPR 2020, appendix B (lazy regularisation).
    """

    loss: Loss
    every: int
    orientation: Loss | None = None
    step: int = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.orientation is None:
            inner = self.loss
            while isinstance(inner, Wrapper):
                inner = inner.loss
            given: dict[str, Any] = {
                name: getattr(inner, name) for name in ("label_smoothing", "impl") if hasattr(inner, name)
            }
            self.orientation = CrossEntropy(**given)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Terms:
        self.step += 1
        if (self.step - 1) % self.every:
            assert self.orientation is not None  # for mypy
            orientation = self.orientation(model, x, y).total
            return Terms(orientation, orientation.new_zeros(()), 0.0)
        terms = self.loss(model, x, y)
        return terms._replace(weight=terms.weight * self.every)
