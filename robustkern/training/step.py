"""One step of training: the loss on this process's part of the batch, gradients of all parts, the optimizer."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustkern import _late
from robustkern import data as datasets
from robustkern._sharded import is_sharded, whole
from robustkern.distributed import LossModule, wrap
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

    With several processes each calls the loss on its rows, and DistributedDataParallel around the loss, or FSDP2 under
    it, averages the gradients of the terms, weighted by the shares of the batch, while the backward pass runs.
    BatchNorm in training mode normalises by the rows of its process, unless it is synchronised; what the processes did
    to the running statistics, or to any buffer, is averaged with the same weights, which neither of the two does.

    With `accumulate`, a process takes its rows in so many parts, one after the other, and sends gradients with the
    last. A loss draws for each part what it would draw for the whole batch.

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
        self._steps = 1
        self._plain: Any = Lazy(loss, 1).orientation if config.plain_epochs else None
        self._module: Any = self._carrier()

    def _carrier(self) -> nn.Module:
        """The loss as a module whose backward pass brings the gradients of all processes."""
        if is_sharded(self.model):
            return wrap(self.model, self._weighted, shard=True)
        module = LossModule(self.model, self._weighted)
        if self.group.size == 1:
            return module
        # Parameters without a gradient are told from others, so that weight decay leaves them alone everywhere; and
        # gradients travel in the same buckets from the first step on, so that a resumed run has the same bits.
        options: Any = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
        known = inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        # DDP prints a page on every process where all parameters have a gradient.
        module.without_gradient = nn.Parameter(self.parameters[0].new_zeros(1))
        with self.group.contact():
            return DistributedDataParallel(module, **options)

    def close(self) -> None:
        """Lets go of the group's communication, which must not outlive the group; no step can follow."""
        self._module = None

    def learning_rate(self, step: int, steps: int) -> float:
        config = self.config
        shares = [epoch / config.epochs for epoch in config.milestones]
        options: Any = {"milestones": shares, "gamma": config.gamma, "least": config.least_lr}
        return learning_rate(config.schedule, config.lr, step, steps, warm_up=config.warm_up / config.epochs, **options)

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
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, steps) * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in self.buffers]
        self._steps = steps
        with self.group.contact(), nullcontext() if self.group.size == 1 else _no_advice():
            values, penalised = self._gradients(x, y, shard, step)
        values = torch.cat([values, values.new_full([1], float(stop))])
        self._sum(values, before, shard)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # Both: a finite loss can have a NaN gradient, and clipping by a NaN norm makes every weight NaN.
        numbers = _late.Late(torch.cat([values, whole(norm).to(values.device).float()[None]]))
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

    def _gradients(self, x: Tensor, y: Tensor, shard: Shard, step: int) -> tuple[Tensor, bool]:
        """Puts gradients into the parameters; returns this process's share of [orientation, smoothness, total]."""
        config, parts = self.config, _parts(shard, self.config.accumulate)
        values, penalised = None, False
        for number, part in enumerate(parts):
            rows = slice(part.offset - shard.offset, part.offset - shard.offset + part.size)
            alone = self.group.size == 1 and len(parts) == 1
            draw = Draw(_generator(config.seed, step, config.device), step, None if alone else part)
            with nullcontext() if number + 1 == len(parts) else self._module.no_sync():
                total, terms, penalised = self._module(x[rows], y[rows], draw)
                # Those of the module: FSDP2 puts others in the place of the optimizer's while they are used.
                inputs = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
                Terms(total, total.detach(), 0.0).backward(inputs)
            values = terms if values is None else values + terms
        assert values is not None  # there is a part
        return values, penalised

    def _weighted(self, model: nn.Module, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, bool]:
        """What is differentiated, the numbers, and whether there is a penalty: the forward pass of what is wrapped."""
        assert draw.step is not None
        config, terms = self.config, self._terms(model, x, y, draw)
        plain = self._plain_steps()
        penalised = draw.step >= plain and (terms.weight != 0 or not isinstance(self.loss, Lazy))
        factor = weight_factor(config.ramp, max(0, draw.step - plain), self._steps - plain)
        terms = terms._replace(weight=terms.weight * factor)
        total, share = terms.total, 1.0 if draw.shard is None else draw.shard.share
        values = torch.stack([terms.orientation, terms.smoothness, total]).detach().float() * share
        # The carriers take the mean over the processes.
        return total if draw.shard is None else total * (share * self.group.size), values, penalised

    def _terms(self, model: nn.Module, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        config = self.config
        # No cache: a pass that records gradients would take from it a weight that was cast without recording.
        with torch.autocast(config.device, torch.bfloat16, enabled=config.amp, cache_enabled=False):
            plain = draw.step is not None and draw.step < self._plain_steps()
            return (self._plain if plain else self.loss)(model, x, y, draw)

    def _plain_steps(self) -> int:
        """Steps of plain training before the method begins."""
        return round(self.config.plain_epochs / self.config.epochs * self._steps)

    @torch.no_grad()
    def _sum(self, values: Tensor, before: list[Tensor], shard: Shard) -> None:
        """Sum the values over the processes, and average what happened to the buffers; one message."""
        if self.group.size == 1:
            return
        # Changes rather than values: what does not change, such as a normalisation's constants, keeps its bits.
        pairs = [pair for pair in zip(self.buffers, before, strict=True) if pair[0].is_floating_point()]
        changes = [(buffer - value) * shard.share for buffer, value in pairs]
        self.group.sum_([*changes, values])
        for (buffer, value), change in zip(pairs, changes, strict=True):
            buffer.copy_(value + change)


def _parts(shard: Shard, count: int) -> list[Shard]:
    """The rows of a process in `count` parts, as many for each process: what they send is sent by all."""
    inner = [Shard.of(number, count, shard.size) for number in range(count)]
    return [Shard(shard.offset + part.offset, part.size, shard.total, shard.idle or part.idle) for part in inner]


@contextmanager
def _no_advice() -> Iterator[None]:
    """DDP advises against gradients in another layout than its buckets', such as those of kernels of one channel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match")
        yield


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
