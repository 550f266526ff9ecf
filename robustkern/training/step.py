"""One step of training: the loss on this process's part of the batch, gradients of all parts, the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import _late
from robustkern import data as datasets
from robustkern.draw import Draw
from robustkern.losses import Lazy
from robustkern.sharding import Shard
from robustkern.terms import Terms

from .config import TrainingConfig
from .distributed import Group
from .methods import Loss
from .schedule import learning_rate, weight_factor


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        orientation: Mean over the whole batch.
        smoothness: Likewise; None if it was not computed in this step.
        finite: Whether loss and gradient were. If not, nothing has changed.
        stop: Whether any process has been asked to stop.
    """

    orientation: float
    smoothness: float | None
    finite: bool
    stop: bool


@dataclass(frozen=True)
class Taken:
    """A step whose numbers may still be on their way."""

    numbers: _late.Late  # orientation, smoothness, total, processes to be stopped, length of the gradient
    penalised: bool
    undo: Callable[[], None]  # of what a step that is not finite did to the optimizer

    def outcome(self) -> Outcome:
        """What it did; the optimizer is as it was before, if that is nothing."""
        orientation, smoothness, total, stopped, length = self.numbers.read()
        finite = _finite(total) and _finite(length)
        if not finite:
            self.undo()
        return Outcome(orientation, smoothness if self.penalised else None, finite, stopped > 0)


class Stepper:
    """Takes steps.

    The draw of a step has a fresh generator, keyed by seed and step and the same on all processes, the number of the
    step, and, with several processes, the rows of the whole batch that the loss is given.

    With `amp`, the loss is called under autocast: convolutions, matrix products and what else PyTorch lists for it run
    in bfloat16, forward and backward, also when an attack or a penalty calls the network. Weights, their gradients,
    norms and cross-entropies are float32.

    With several processes each calls the loss on its rows and the gradients of the terms, weighted by the shares of the
    batch, are summed. BatchNorm in training mode normalises by the rows of its process, unless it is synchronised; what
    the processes did to the running statistics, or to any buffer, is averaged with the same weights.

    On a GPU of one process nothing waits for the device: whether a step is finite is decided there, which puts weights
    and buffers back, and read in the next step.  The optimizer's state, which no forward pass sees, is put back then.

    Attributes:
        late: Whether it is so.
    """

    def __init__(
        self, config: TrainingConfig, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, group: Group
    ) -> None:
        self.config, self.model, self.optimizer, self.loss, self.group = config, model, optimizer, loss, group
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = list(model.buffers())
        self.late = group.size == 1 and any(_late.must_wait(parameter) for parameter in self.parameters)

    def learning_rate(self, step: int, steps: int) -> float:
        config = self.config
        shares = [epoch / config.epochs for epoch in config.milestones]
        return learning_rate(config.schedule, config.lr, step, steps, milestones=shares, gamma=config.gamma)

    def take(self, x: Tensor, y: Tensor, shard: Shard, step: int, steps: int, *, stop: bool = False) -> Outcome:
        """`start`, and what came of it."""
        return self.start(x, y, shard, step, steps, stop=stop).outcome()

    def start(
        self,
        x: Tensor,
        y: Tensor,
        shard: Shard,
        step: int,
        steps: int,
        *,
        stop: bool = False,
        before_update: Callable[[], None] = lambda: None,
    ) -> Taken:
        """One step.

        Args:
            x: This process's rows of the batch.
            y: Their labels.
            shard: Which rows they are.
            step: Number of the step, from 0.
            steps: Steps of the whole run.
            stop: Whether this process has been asked to stop.
            before_update: Called before the weights change: the time to ask for the outcome of the step before.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.buffers]
        terms = self._terms(x, y, shard, step)
        penalised = terms.weight != 0 or not isinstance(self.loss, Lazy)
        terms = terms._replace(weight=terms.weight * weight_factor(config.ramp, step, steps))
        total = terms.total
        if self.group.size == 1:
            terms.backward(inputs=self.parameters)
        else:
            (total * shard.share).backward(inputs=self.parameters)
        # [orientation, smoothness, total, processes to be stopped]
        values = torch.stack([terms.orientation, terms.smoothness, total]).detach().float() * shard.share
        values = torch.cat([values, values.new_full([1], float(stop))])
        self._sum(values, before, shard)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # Both: a finite loss can have a NaN gradient, and clipping by a NaN norm makes every weight NaN.
        numbers = _late.Late(torch.cat([values, norm.float()[None]]))
        if not self.late:
            taken = Taken(numbers, penalised, lambda: None)
            outcome = taken.outcome()
            before_update()
            if outcome.finite:
                self._update(norm)
            else:  # BatchNorm has seen the batch too
                _put_back(self.buffers, before)
            return taken
        finite = values[2].isfinite() & norm.isfinite()
        _select(finite, self.buffers, before)
        before_update()
        weights, undo = [parameter.detach().clone() for parameter in self.parameters], self._undo()
        self._update(norm)
        _select(finite, self.parameters, weights)
        return Taken(numbers, penalised, undo)

    def _update(self, norm: Tensor) -> None:
        if self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        self.optimizer.step()

    def _undo(self) -> Callable[[], None]:
        """Puts the optimizer's state back as it is now."""

        def copy(entries: dict[str, Any]) -> dict[str, Any]:
            return {key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()}

        before = {parameter: copy(entries) for parameter, entries in self.optimizer.state.items()}

        def undo() -> None:
            self.optimizer.state.clear()
            self.optimizer.state.update(before)

        return undo

    def _terms(self, x: Tensor, y: Tensor, shard: Shard, step: int) -> Terms:
        config = self.config
        draw = Draw(_generator(config.seed, step, config.device), step, shard if self.group.size > 1 else None)
        # No cache: a pass that records gradients would take from it a weight that was cast without recording.
        with torch.autocast(config.device, torch.bfloat16, enabled=config.amp, cache_enabled=False):
            return self.loss(self.model, x, y, draw)

    @torch.no_grad()
    def _sum(self, values: Tensor, before: list[Tensor], shard: Shard) -> None:
        """Sum gradients and values over the processes, and average what happened to the buffers; one message."""
        if self.group.size == 1:
            return
        # A parameter without a gradient has none afterwards, so that weight decay leaves it alone everywhere.
        present = values.new_tensor([float(parameter.grad is not None) for parameter in self.parameters])
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # Changes rather than values: what does not change, such as a normalisation's constants, keeps its bits.
        pairs = [pair for pair in zip(self.buffers, before, strict=True) if pair[0].is_floating_point()]
        changes = [(buffer - value) * shard.share for buffer, value in pairs]
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.group.sum_([*gradients, *changes, present, values])
        for parameter, count in zip(self.parameters, present.tolist(), strict=True):
            if not count:
                parameter.grad = None
        for (buffer, value), change in zip(pairs, changes, strict=True):
            buffer.copy_(value + change)


@torch.no_grad()
def _put_back(tensors: list[Tensor], before: list[Tensor]) -> None:
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _select(keep: Tensor, tensors: list[Any], before: list[Tensor]) -> None:
    """tensor = tensor if `keep`, a number on the device, and the one before if not."""
    for tensor, value in zip(tensors, before, strict=True):
        torch.where(keep, tensor, value, out=tensor)


def _generator(seed: int, step: int, device: str) -> torch.Generator:
    """The random numbers of a step, on the device of the batch."""
    generator = datasets.generator(seed, "projections", step)
    return generator if device == "cpu" else torch.Generator(device).manual_seed(generator.initial_seed())


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
