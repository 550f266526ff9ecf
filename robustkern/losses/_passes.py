"""What losses that look at a batch more than once share: whose statistics count, and what a second look costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


def leaf(name: str, x: Tensor) -> Tensor:
    """x as something to differentiate by: itself if it requires grad, which is what torch.compile of a step needs."""
    check_images(name, x)
    return x if x.requires_grad else x.detach().requires_grad_()


def check_images(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is floating point."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be a floating-point tensor, got {x.dtype}")


def check_weight(name: str, weight: float, argument: str = "weight") -> None:
    """Raises ValueError unless the weight is a number that is not negative."""
    if isinstance(weight, str) or not 0 <= weight < float("inf"):
        raise ValueError(f"{name}: {argument} must be a number that is not negative, got {weight!r}")


@contextmanager
def frozen_statistics(model: Model) -> Iterator[None]:
    """BatchNorm and InstanceNorm in training mode normalise as ever, and leave their running statistics alone."""
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


@contextmanager
def forgotten_casts() -> Iterator[None]:
    """For a forward pass without a graph: autocast must not keep its 16-bit weights for the next, which has one."""
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def value_without_graph(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(model(x)), one forward pass without a graph; its backward pass makes up for it, if anybody asks.

    A loss that shows a term which its total does not depend on pays for the value alone: where the gradient that
    arrives is zero nothing is computed, and where it is not, forward and backward pass are.  Running statistics stay as
    they are.  Differentiable once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not parameters:
        with frozen_statistics(model):
            return function(model(x))
    value: Tensor = _Deferred.apply(model, function, x, *parameters)
    return value


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, function, x, *parameters):  # type: ignore[no-untyped-def]
        device = x.device.type
        ctx.model, ctx.function, ctx.parameters = model, function, parameters
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x)
        with frozen_statistics(model), forgotten_casts():
            return function(model(x))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        nothing = (None,) * (3 + len(ctx.parameters))
        if torch.is_grad_enabled():
            raise RuntimeError("the clean term of an adversarial loss is differentiable once, not with create_graph")
        if not bool(grad.any()):
            return nothing
        (x,) = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled), frozen_statistics(ctx.model):
            value = ctx.function(ctx.model(x.detach()))
        return nothing[:3] + torch.autograd.grad(value, ctx.parameters, grad, allow_unused=True)
