"""What losses with an attack inside share: the attack, separate from the terms, and ascent in a ball."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import STARTS, Impl, Norm, Start
from robustkern._classifier import gradient_of, logits_of
from robustkern._options import check_options
from robustkern.attacks import FGSM, NFGSM, PGD, attacked
from robustkern.attacks._common import check_batch
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms

_SMALL = 1e-3  # standard deviation of the Gaussian start, in units of the image
_PGD_10 = PGD(8 / 255, 2 / 255, steps=10)


@dataclass(frozen=True)
class AttackLoss(Loss):
    """total = orientation + weight * smoothness, at x and at adversaries that an attack finds.

    `adversaries` runs the attack, `terms` computes what is differentiated; a call runs one after the other.
    """

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        return self.terms(model, x, self.adversaries(model, x, y, draw), y, draw)

    def adversaries(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Any:
        """What the attack finds, without history, for `terms`."""
        raise NotImplementedError

    def terms(self, model: Model, x: Tensor, adversary: Any, y: Tensor, draw: Draw) -> Terms:
        """Both terms, given what the attack found."""
        raise NotImplementedError

    def _both_logits(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The logits at x and at the adversary, by two passes that draw the same random numbers."""
        name, state = type(self).__name__, RandomState(model, x)
        clean = logits_of(name, model, x, y)
        with state.again():
            return clean, logits_of(name, model, adversary, y)


@dataclass(frozen=True)
class GivenAttackLoss(AttackLoss):
    """total = orientation + weight * smoothness, at x and at the adversaries of a given attack."""

    attack: FGSM | NFGSM | PGD = _PGD_10

    def adversaries(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        return self.attack(model, x, y, draw.generator, indices=draw.samples(x))


@dataclass(frozen=True)
class AscentLoss(AttackLoss):
    """total = orientation + weight * smoothness, with adversaries that maximise something in a ball, step by step.

    The last iterate is the adversary, as in the published codes.  An attack takes one forward pass or two, and `steps`
    times forward and input gradient.

    Args:
        eps: radius of the ball, in units of x; for norm "linf" also a tensor that broadcasts over a sample.
        step_size: length of a step; None: 2.5 eps / steps, which is 2/255 for ten steps in a ball of 8/255.
        steps: number of steps.
        norm: "linf", "l2" or "l1".
        start: "gaussian" (x plus noise of standard deviation 0.001, in the ball) or "uniform" (anywhere in the ball).
        impl: "auto", "kernel" or "reference".
    """

    eps: float | Tensor = field(default=8 / 255, kw_only=True)
    step_size: float | Tensor | None = field(default=None, kw_only=True)
    steps: int = field(default=10, kw_only=True)
    norm: Norm = field(default="linf", kw_only=True)
    start: Start = field(default="gaussian", kw_only=True)
    impl: Impl = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        check_options(self, box=True, start=STARTS)

    def adversaries(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        name = type(self).__name__
        logits, x, y = check_batch(name, model, x, y, draw.generator, eps=self.eps, norm=self.norm, soft=self.soft)
        step = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        with torch.inference_mode(False), attacked(model):
            objective = self._objective(logits, x, y)
            adversary = self._start(x, draw)
            for _ in range(self.steps):
                grad = gradient(name, objective, adversary)
                ops.attack_step(adversary, x, grad, eps=self.eps, step_size=step, norm=self.norm, impl=self.impl)
        return adversary

    def _objective(self, model: Model, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The function of the images that is maximised, [B]; the model is in eval mode."""
        raise NotImplementedError

    def _start(self, x: Tensor, draw: Draw) -> Tensor:
        if self.start == "uniform":
            return ops.attack_start(
                x, eps=self.eps, norm=self.norm, generator=draw.generator, samples=draw.samples(x), impl=self.impl
            )
        start = x + (_SMALL * draw.normal(x)).to(x.dtype)
        # Without a step it projects on the ball and the box.
        return ops.attack_step(start, x, eps=self.eps, norm=self.norm, impl=self.impl)


def gradient(name: str, objective: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of each sample's objective, without history; `name` is the loss's, for messages."""
    with torch.enable_grad():
        probe = x.detach().requires_grad_()
        return gradient_of(name, objective(probe), probe)
