"""Projected gradient descent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import OBJECTIVES, AttackObjective, Impl, Norm
from robustkern._options import check_options
from robustkern.attacks._common import Attack, Best, Model, evaluate, keep_rows
from robustkern.reference.random_cotangents import draw_seed


@dataclass(frozen=True)
class PGD(Attack):
    """x' = argmax of a loss over ||x' - x|| <= eps, x' in [0, 1], by steepest ascent in the norm.

    x_{t+1} = P(x_t + step_size * d(gradient)), from a random start, with P and d of `robustkern.ops.attack_step`.  Of
    all iterates of all restarts, each sample keeps one that fools the model, if there is one, and among those the one
    with the highest loss: more restarts never weaken it.  Passes: for each restart, `steps` times forward and input
    gradient, and one forward.
    Source: Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    Threat model: white box; x and x' in [0, 1], eps in the same units (8/255), normalisation inside the model.

    Attributes:
        eps: Radius of the ball, at most that of the box; for norm "linf" also a tensor, array or list that broadcasts
            over a sample, such as [C, 1, 1].
        step_size: Length of a step in the norm; by default 2.5 eps / steps, which lets a sample cross the ball.
        steps: Number of steps.
        restarts: Number of random starts.
        norm: "linf", "l2" or "l1".
        random_start: Start at a uniformly random point of the ball (True) or at x (False).
        loss: "ce" (cross-entropy), "cw" or "dlr" (see `robustkern.ops.margin_loss`).
        targeted: Whether y is the class that the model should predict, not the one that it should leave.
        early_exit: Stop at a sample as soon as it fools the model.  The same samples are fooled; their loss may be
            lower, and each step waits for the device.
        coordinates: For norm "l1": how many coordinates share a step.
        impl: "auto", "kernel" or "reference" for the operators.

    >>> from robustkern.attacks import PGD
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> adversaries = PGD(eps=0.1, steps=3)(model, x, y)
    >>> bool((adversaries - x).abs().max() <= 0.1 + 1e-6)
    True
    """

    eps: float | Tensor
    step_size: float | Tensor | None = None
    steps: int = 20
    restarts: int = 1
    norm: Norm = "linf"
    random_start: bool = True
    loss: AttackObjective = "ce"
    targeted: bool = False
    early_exit: bool = False
    coordinates: int = 1
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_options(self, box=True, loss=OBJECTIVES)

    def _search(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, indices: Tensor | None
    ) -> Tensor:
        seed = draw_seed(x, generator) if self.random_start else None
        step = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        best = Best(x)
        for restart in range(self.restarts):
            rows = (~best.fooled).nonzero().squeeze(1) if self.early_exit else None
            if rows is not None and not len(rows):
                break
            self._ascend(model, x, y, best, step, seed, indices, restart, rows)
        return best.adversary

    def _ascend(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        best: Best,
        step: float | Tensor,
        seed: Tensor | None,
        indices: Tensor | None,
        restart: int,
        rows: Tensor | None,
    ) -> None:
        """One restart, on all samples or on `rows`; `best` takes in every iterate."""
        samples = indices
        if rows is not None:
            x, y = keep_rows(rows, x, y)
            samples = rows if indices is None else indices[rows]
        adversary = x.clone()
        if seed is not None:
            adversary = ops.attack_start(
                x, eps=self.eps, norm=self.norm, seed=seed, samples=samples, restart=restart, impl=self.impl
            )
        for t in range(self.steps + 1):
            loss, fooled, grad = evaluate(
                "PGD", model, adversary, y, self.loss, need_grad=t < self.steps, targeted=self.targeted, impl=self.impl
            )
            best.update(adversary, loss, fooled, rows)
            if grad is None:
                return
            if rows is not None:
                left = (~fooled).nonzero().squeeze(1)
                if not len(left):
                    return
                if len(left) < len(rows):
                    rows, x, y, adversary, grad = keep_rows(left, rows, x, y, adversary, grad)
            ops.attack_step(
                adversary,
                x,
                grad,
                eps=self.eps,
                step_size=step,
                norm=self.norm,
                coordinates=self.coordinates,
                impl=self.impl,
            )
