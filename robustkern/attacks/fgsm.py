"""One-step attacks, as fast adversarial training uses them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import OBJECTIVES, AttackObjective, Impl, Norm
from robustkern._options import check_options
from robustkern.attacks._common import Attack, Model, evaluate


@dataclass(frozen=True)
class FGSM(Attack):
    """x' = P(x_0 + step_size * d(gradient of the loss at x_0)), x_0 random in the ball or x.

    P projects on the eps ball and on [0, 1], d is sign() for norm "linf": see `robustkern.ops.attack_step`.  Passes:
    one forward and one input gradient.
    Sources: Goodfellow et al., Explaining and harnessing adversarial examples, ICLR 2015 (without random start); Wong
    et al., Fast is better than free, ICLR 2020 (with it, and step 1.25 eps).

    Threat model: white box; x and x' in [0, 1], eps in the same units (8/255), normalisation inside the model.

    Attributes:
        eps: Radius of the ball, at most that of the box; for norm "linf" also a tensor, array or list that broadcasts
            over a sample, such as [C, 1, 1].
        step_size: Length of the step in the norm; by default 1.25 eps with a random start, eps without.
        norm: "linf", "l2" or "l1".
        random_start: Start at a uniformly random point of the ball (True) or at x (False).
        loss: "ce", "cw" or "dlr".
        targeted: Whether y is the class that the model should predict, not the one that it should leave.
        coordinates: For norm "l1": how many coordinates share the step.
        impl: "auto", "kernel" or "reference" for the operators.

    >>> from robustkern.attacks import FGSM
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> adversaries = FGSM(eps=0.1)(model, x, y)
    >>> bool((adversaries - x).abs().max() <= 0.1 + 1e-6)
    True
    """

    eps: float | Tensor
    step_size: float | Tensor | None = None
    norm: Norm = "linf"
    random_start: bool = True
    loss: AttackObjective = "ce"
    targeted: bool = False
    coordinates: int = 1
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_options(self, box=True, loss=OBJECTIVES)

    def _search(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, indices: Tensor | None
    ) -> Tensor:
        step = (1.25 if self.random_start else 1.0) * self.eps if self.step_size is None else self.step_size
        start = self.eps if self.random_start else None
        return _one_step(self, model, x, y, generator, indices, start, self.eps, step)


@dataclass(frozen=True)
class NFGSM(Attack):
    """x' = clamp(x_0 + step_size * sign(gradient of the loss at x_0), 0, 1), x_0 = clamp(x + U(-noise eps, noise eps)).

    The noise exceeds the ball, and nothing projects on the ball: x' - x may reach noise * eps + step_size.  Meant
    for training, where it prevents catastrophic overfitting; not an attack to evaluate with.
    Source: de Jorge et al., Make some noise: reliable and efficient single-step adversarial training, NeurIPS 2022.

    Attributes:
        eps: The radius that training aims at; a number or a tensor that broadcasts over a sample.
        step_size: Length of the step; by default eps.
        noise: Size of the noise, in units of eps.
        loss: "ce", "cw" or "dlr".
        impl: "auto", "kernel" or "reference" for the operators.

    >>> from robustkern.attacks import NFGSM
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> adversaries = NFGSM(eps=0.1)(model, x, y)  # its noise may leave the ball
    >>> bool((adversaries >= 0).all() and (adversaries <= 1).all())
    True
    """

    eps: float | Tensor
    step_size: float | Tensor | None = None
    noise: float = 2.0
    loss: AttackObjective = "ce"
    impl: Impl = "auto"

    norm = "linf"
    targeted = False
    coordinates = 1

    def __post_init__(self) -> None:
        check_options(self, box=True, loss=OBJECTIVES)

    def _search(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, indices: Tensor | None
    ) -> Tensor:
        step = self.eps if self.step_size is None else self.step_size
        # The box alone holds x': a ball of radius 1 around x contains it.
        return _one_step(self, model, x, y, generator, indices, self.noise * self.eps, 1.0, step)


def _one_step(
    attack: FGSM | NFGSM,
    model: Model,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None,
    indices: Tensor | None,
    start: float | Tensor | None,
    radius: float | Tensor,
    step: float | Tensor,
) -> Tensor:
    norm, impl = attack.norm, attack.impl
    adversary = x.clone()
    if start is not None:
        adversary = ops.attack_start(x, eps=start, norm=norm, generator=generator, samples=indices, impl=impl)
    name = type(attack).__name__
    _, _, grad = evaluate(name, model, adversary, y, attack.loss, need_grad=True, targeted=attack.targeted, impl=impl)
    return ops.attack_step(
        adversary, x, grad, eps=radius, step_size=step, norm=norm, coordinates=attack.coordinates, impl=impl
    )
