"""What losses with several passes share: frozen statistics, equal random numbers, and values without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import _late
from robustkern._sharded import is_sharded
from robustkern.losses.loss import Model
from robustkern.terms import Terms


def leaf(x: Tensor) -> Tensor:
    """A leaf to differentiate by: x itself if it requires grad, which torch.compile of a step needs, else a new one."""
    return x if x.requires_grad else x.detach().requires_grad_()


class RandomState:
    """The random numbers that the next forward pass draws from PyTorch's default generators, such as dropout's masks.

    Passes that are compared must be of one function: each of them but the first runs within `again()`, which draws
    the same numbers and leaves the generators as it found them, as after one pass.  It covers the CPU's generator,
    those of the GPUs that x and the model's parameters are on, and the given one; it does not cover Python's and
    NumPy's, nor what torch.compile traces or a CUDA graph captures.
    """

    def __init__(self, model: Model, x: Tensor, generator: torch.Generator | None = None) -> None:
        self._states: list[tuple[torch.Generator, Tensor]] = []
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        generators = [torch.default_generator] + ([] if generator is None else [generator])
        if x.is_cuda:
            parameters = model.parameters() if isinstance(model, nn.Module) else ()
            devices = {x.device, *(p.device for p in parameters if p.is_cuda)}
            generators += [torch.cuda.default_generators[device.index] for device in devices]
        self._states = [(generator, generator.get_state()) for generator in generators]

    @contextmanager
    def again(self) -> Iterator[None]:
        before = [(generator, generator.get_state()) for generator, _ in self._states]
        try:
            _set(self._states)
            yield
        finally:
            _set(before)


def _set(states: list[tuple[torch.Generator, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


@contextmanager
def frozen_statistics(model: Model) -> Iterator[None]:
    """Inside, BatchNorm and InstanceNorm in training mode normalise as usual but keep their running statistics."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    frozen = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    flags = [m.track_running_stats for m in frozen]
    # InstanceNorm updates whatever statistics it has: it gets none.
    instances = [m for m in frozen if isinstance(m, nn.modules.instancenorm._InstanceNorm)]
    statistics = [(m.running_mean, m.running_var) for m in instances]
    try:
        for module in frozen:
            module.track_running_stats = False
        for module in instances:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, flag in zip(frozen, flags, strict=True):
            module.track_running_stats = flag
        for module, (mean, var) in zip(instances, statistics, strict=True):
            module.running_mean, module.running_var = mean, var


def value_without_graph(model: Model, function: Callable[[Tensor], Tensor], x: Tensor, state: RandomState) -> Tensor:
    """function(model(x)) by a forward pass without a graph; if a gradient arrives, the backward pass builds the graph.

    A term that the total does not depend on then costs its value alone.  If the gradient that arrives is zero, nothing
    is computed; if it is not, a forward and a backward pass are, with the same random `state`.  On a GPU, where looking
    would wait for the device, they always are: `Rise` sees to it that no gradient arrives there without need.  Running
    statistics stay as they are.  Differentiable once.  A model that is not an `nn.Module`, whose parameters cannot be
    seen, gets its graph at once; so does one that FSDP2 manages.
    """
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    # FSDP2 knows no forward pass inside a backward pass.
    if not torch.is_grad_enabled() or not parameters or is_sharded(model):
        with frozen_statistics(model):
            return function(model(x))
    value: Tensor = _Deferred.apply(model, function, x, state, *parameters)
    return value


class Rise(Terms):
    """The terms of which the smoothness is how much the attacked loss is above the orientation.

    With weight 1 the total is the attacked loss, and nothing of it leads to the orientation.
    """

    _attacked: Tensor | None = None

    @classmethod
    def of(cls, orientation: Tensor, attacked: Tensor, weight: float) -> Rise:
        terms = cls(orientation, attacked - orientation, weight)
        terms._attacked = attacked
        return terms

    @property
    def total(self) -> Tensor:
        return super().total if self._attacked is None or self.weight != 1 else self._attacked

    def _replace(self, **fields: Any) -> Rise:
        terms = super()._replace(**fields)
        terms._attacked = self._attacked if fields.keys() <= {"weight"} else None
        return terms


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, function, x, state, *parameters):  # type: ignore[no-untyped-def]
        device = x.device.type
        ctx.model, ctx.function, ctx.state, ctx.parameters = model, function, state, parameters
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x)
        # No cache: the next pass must not take 16-bit weights from it that were cast without a graph.
        with frozen_statistics(model), torch.autocast(*ctx.autocast, cache_enabled=False):
            return function(model(x))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        nothing = (None,) * (4 + len(ctx.parameters))
        if torch.is_grad_enabled():
            raise RuntimeError("the clean term of an adversarial loss is differentiable once, not with create_graph")
        if not _late.must_wait(grad) and not bool(grad.any()):
            return nothing
        (x,) = ctx.saved_tensors
        with (
            torch.enable_grad(),
            torch.autocast(*ctx.autocast),
            frozen_statistics(ctx.model),
            ctx.state.again(),
        ):
            value = ctx.function(ctx.model(x.detach()))
        return nothing[:4] + torch.autograd.grad(value, ctx.parameters, grad, allow_unused=True)
