"""Auto-PGD: projected gradient ascent that finds its step size by itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import TARGETED_OBJECTIVES, THREATS, AttackObjective, Impl, TargetedObjective, Threat
from robustkern._options import check_options
from robustkern.attacks._common import Attack, Best, Model, evaluate, keep_rows
from robustkern.reference.random_cotangents import draw_seed

_MOMENTUM = 0.75  # share of the new step; the rest repeats the last one
_RISES = 0.75  # share of a period's steps that must raise the loss


@dataclass(frozen=True)
class APGD(Attack):
    """x_{t+1} = P(x_t + 0.75 (z - x_t) + 0.25 (x_t - x_{t-1})), z = P(x_t + eta d(gradient)), eta from 2 eps down.

    At checkpoints, ever closer to each other, a sample's eta is halved and it goes on from its best point so far if
    fewer than three quarters of the steps since the last checkpoint raised its loss, or if eta was not halved there and
    the best loss has not grown since.  Nothing needs tuning.  Later restarts leave out samples that are fooled already.
    Passes: `steps` times forward and input gradient, and one forward more, for each restart.
    Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, ICML 2020.

    Threat model: white box; x and x' in [0, 1], eps in the same units (8/255), normalisation inside the model.

    Attributes:
        eps: Radius of the ball, at most that of the box; for norm "linf" also a tensor, array or list that broadcasts
            over a sample, such as [C, 1, 1].
        steps: Number of steps.
        restarts: Number of random starts; for loss "dlr-targeted", of target classes, one per start: the runner-up
            first, then the next.
        norm: "linf" or "l2".
        loss: "ce", "cw", "dlr" or "dlr-targeted".
        random_start: Start at a uniformly random point of the ball (True) or at x (False).
        impl: "auto", "kernel" or "reference" for the operators.

    >>> from robustkern.attacks import APGD
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> adversaries = APGD(eps=0.1, steps=5)(model, x, y)
    >>> bool((adversaries - x).abs().max() <= 0.1 + 1e-6)
    True
    """

    eps: float | Tensor
    steps: int = 100
    restarts: int = 1
    norm: Threat = "linf"
    loss: TargetedObjective = "ce"
    random_start: bool = True
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_options(self, box=True, loss=TARGETED_OBJECTIVES, norm=THREATS)

    def _search(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, indices: Tensor | None
    ) -> Tensor:
        seed = draw_seed(x, generator) if self.random_start else None
        classes = self._classes(model, x, y) if self.loss == "dlr-targeted" and len(x) else None
        best = Best(x)
        for restart in range(self.restarts):
            rows = (~best.fooled).nonzero().squeeze(1) if restart else None  # at first all: nothing to wait for
            if not len(x if rows is None else rows):
                break
            towards = None if classes is None else classes[:, restart].contiguous()
            images, labels, samples = x, y, indices
            if rows is not None:
                images, labels, samples, towards = keep_rows(rows, x, y, indices, towards)
                samples = rows if samples is None else samples
            adversary, loss, fooled = self._ascend(model, images, labels, towards, seed, samples, restart)
            best.update(adversary, loss, fooled, rows)
        return best.adversary

    def _classes(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """The classes other than y, the likeliest first.  [B, restarts]"""
        with torch.no_grad():
            logits = model(x).clone()
        if self.restarts > logits.shape[1] - 1:
            raise ValueError(
                f"APGD: restarts must be at most {logits.shape[1] - 1} for loss 'dlr-targeted' and {logits.shape[1]} "
                f"classes, got {self.restarts}"
            )
        logits.scatter_(1, y[:, None], -torch.inf)
        return logits.argsort(dim=1, descending=True, stable=True)[:, : self.restarts]

    def _ascend(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        towards: Tensor | None,
        seed: Tensor | None,
        samples: Tensor | None,
        restart: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One restart: the best adversary of each sample, its loss, whether it fools the model."""
        options: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "impl": self.impl}
        kind: AttackObjective = "dlr" if self.loss == "dlr-targeted" else self.loss
        current = x.clone()
        if seed is not None:
            current = ops.attack_start(x, seed=seed, samples=samples, restart=restart, **options)
        found = Best(x)  # what the attack returns: an adversary that fools comes first
        loss, fooled, grad = evaluate("APGD", model, current, y, kind, need_grad=True, towards=towards, impl=self.impl)
        assert grad is not None
        found.update(current, loss, fooled)
        # What it ascends from: the highest loss, whether it fools or not.
        top, top_grad, top_loss = current.clone(), grad.clone(), loss
        previous = current.clone()
        scale = torch.ones_like(loss)
        halved = torch.ones_like(fooled)
        rises, since, checked_loss = torch.zeros_like(loss), 0, loss
        period = max(int(0.22 * self.steps), 1)
        least, shorter = max(int(0.06 * self.steps), 1), max(int(0.03 * self.steps), 1)
        for t in range(self.steps):
            z = current.clone()
            ops.attack_step(z, x, grad, step_size=2.0 * self.eps, scale=scale, **options)
            if t > 0:
                z.sub_(current).mul_(_MOMENTUM).add_(current).add_(current - previous, alpha=1.0 - _MOMENTUM)
                ops.attack_step(z, x, **options)
            previous, current, last_loss = current, z, loss
            loss, fooled, new_grad = evaluate(
                "APGD", model, current, y, kind, need_grad=t + 1 < self.steps, towards=towards, impl=self.impl
            )
            found.update(current, loss, fooled)
            if new_grad is None:
                break
            grad = new_grad
            rises += loss > last_loss
            higher = loss > top_loss
            mask = higher.view(-1, *[1] * (x.dim() - 1))
            torch.where(mask, current, top, out=top)
            torch.where(mask, grad, top_grad, out=top_grad)
            top_loss = torch.where(higher, loss, top_loss)
            since += 1
            if since == period:
                stuck = ~halved & (checked_loss >= top_loss)
                halved, checked_loss = (rises <= _RISES * period) | stuck, top_loss
                scale = torch.where(halved, scale / 2, scale)
                mask = halved.view(-1, *[1] * (x.dim() - 1))
                current, grad = torch.where(mask, top, current), torch.where(mask, top_grad, grad)
                loss = torch.where(halved, top_loss, loss)
                period, since, rises = max(period - shorter, least), 0, torch.zeros_like(loss)
        assert found.loss is not None
        return found.adversary, found.loss, found.fooled
