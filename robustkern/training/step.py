"""One step of training: the loss on this process's part of the batch, gradients of all parts, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """

    def __init__(
        self, config: TrainingConfig, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, group: Group
    ) -> None:
        self.config, self.model, self.optimizer, self.loss, self.group = config, model, optimizer, loss, group
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = list(model.buffers())

    def learning_rate(self, step: int, steps: int) -> float:
        config = self.config
        shares = [epoch / config.epochs for epoch in config.milestones]
        return learning_rate(config.schedule, config.lr, step, steps, milestones=shares, gamma=config.gamma)

    def take(self, x: Tensor, y: Tensor, shard: Shard, step: int, steps: int, *, stop: bool = False) -> Outcome:
        """One step.

        Args:
            x: This process's rows of the batch.
            y: Their labels.
            shard: Which rows they are.
            step: Number of the step, from 0.
            steps: Steps of the whole run.
            stop: Whether this process has been asked to stop.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.buffers]
        terms = self._terms(x, y, shard, step)
        penalised = terms.weight != 0 or not isinstance(self.loss, Lazy)
        terms = terms._replace(weight=terms.weight * weight_factor(config.ramp, step, steps))
        if self.group.size == 1:
            terms.backward(inputs=self.parameters)
        else:
            (terms.total * shard.share).backward(inputs=self.parameters)
        # [orientation, smoothness, total, processes to be stopped]
        values = torch.stack([terms.orientation, terms.smoothness, terms.total]).detach().float() * shard.share
        values = torch.cat([values, values.new_tensor([float(stop)])])
        self._sum(values, before, shard)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # Both: a finite loss can have a NaN gradient, and clipping by a NaN norm makes every weight NaN.
        orientation, smoothness, total, stopped, length = torch.cat([values, norm.float()[None]]).tolist()
        finite = _finite(total) and _finite(length)
        if finite:
            if config.clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip, norm)
            self.optimizer.step()
        else:  # BatchNorm has seen the batch too
            with torch.no_grad():
                for buffer, value in zip(self.buffers, before, strict=True):
                    buffer.copy_(value)
        return Outcome(orientation, smoothness if penalised else None, finite, stopped > 0)

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


def _generator(seed: int, step: int, device: str) -> torch.Generator:
    """The random numbers of a step, on the device of the batch."""
    generator = datasets.generator(seed, "projections", step)
    return generator if device == "cpu" else torch.Generator(device).manual_seed(generator.initial_seed())


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
