"""The second derivative of torch.nn.SyncBatchNorm, which PyTorch does not have.

    xh = (x - mean) r,   P(v) = v - mean(v) - xh mean(v xh)
    first backward    grad_x = w r P(g)   grad_w = sum g xh   grad_b = sum g          cotangents of these: u, a, b
    second backward   grad_g = w r P(u) + a xh + b
                      grad_x = -w r^2 [mean(u P(g)) xh + mean(g xh) P(u) + mean(u xh) P(g)] + r P(a g)
                      grad_w = r sum g P(u)

Means run over all processes; sums, and a and b, belong to one process.  grad_x is the derivative of the sum of all
processes' losses, as in PyTorch's first backward; grad_w is one process's share of that derivative.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules import _functions

_ORIGINAL: Callable[..., tuple[Tensor | None, ...]] = _functions.SyncBatchNorm.backward


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its derivative is the sum of all processes' cotangents."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad.contiguous(), ctx.group), None


class _SyncBatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor | None, saved: tuple[Tensor, ...], group: Any, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        mean, invstd, counts = saved
        ctx.save_for_backward(g, x, w, mean, invstd, counts)
        ctx.set_materialize_grads(False)
        ctx.group = group
        node = SimpleNamespace(saved_tensors=(x, w, mean, invstd, counts), process_group=group, needs_input_grad=needs)
        grads = _ORIGINAL(node, g)
        # PyTorch gives None for an empty batch; without a node, this process would miss the sums that follow.
        return tuple(
            torch.zeros_like(like) if grad is None and needed and like is not None else grad
            for grad, like, needed in zip(grads, (x, w, w), needs)
        )

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = _second_backward((u, a, b), ctx.saved_tensors, ctx.group)
        asked = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]
        return (*asked, None, None, None)


def _second_backward(
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None], saved: tuple[Any, ...], group: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients in grad, x and weight, from cotangents of the first backward's results; differentiable once more."""
    u, a, b = cotangents
    grad, x, weight, mean, invstd, counts = saved
    count = counts.sum()
    others = [d for d in range(x.dim()) if d != 1]
    wide = mean.dtype

    def spread(t: Tensor) -> Tensor:
        return t.to(wide).view(-1, *[1] * (x.dim() - 2))

    def total(*terms: Tensor) -> Tensor:
        """[len(terms), C], over all processes."""
        return _AllReduce.apply(torch.stack([t.sum(others) for t in terms]), group)

    g, v = grad.to(wide), x.to(wide)
    center, r = spread(mean), spread(invstd)
    if torch.is_grad_enabled():  # makes the statistics functions of x, with the same values
        own = spread(total(v)[0] / count)
        center = own + (center - own).detach()
        variance = spread(total((v - center).square())[0] / count)
        r = (variance + (r.pow(-2) - variance).detach()).rsqrt()
    xh = (v - center) * r
    w = spread(weight) if weight is not None else torch.ones_like(center)
    cotangent = u.to(wide) if u is not None else torch.zeros_like(g)
    of_weight = spread(a) * g if a is not None else torch.zeros_like(g)

    terms = (cotangent, cotangent * xh, g, g * xh, cotangent * g, of_weight, of_weight * xh)
    mean_u, mean_ux, mean_g, mean_gx, mean_ug, mean_a, mean_ax = (spread(t / count) for t in total(*terms))
    projected_u = cotangent - mean_u - xh * mean_ux
    projected_g = g - mean_g - xh * mean_gx
    bend = (mean_ug - mean_u * mean_g - mean_ux * mean_gx) * xh + mean_gx * projected_u + mean_ux * projected_g
    grad_x = r * (of_weight - mean_a - xh * mean_ax) - w * r * r * bend
    grad_g = w * r * projected_u
    if a is not None:
        grad_g = grad_g + spread(a) * xh
    if b is not None:
        grad_g = grad_g + spread(b)
    grad_w = (r * g * projected_u).sum(others).to(weight.dtype) if weight is not None else None
    return grad_g.to(grad.dtype), grad_x.to(x.dtype), grad_w


@functools.cache
def replace(enabled: Callable[[], bool]) -> None:
    """Makes SyncBatchNorm's backward differentiable in every graph that is built while `enabled()` is true."""
    if not dist.is_available():
        return

    @functools.wraps(_ORIGINAL)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not enabled():
            return _ORIGINAL(ctx, grad)
        x, weight, *saved = ctx.saved_tensors
        grads = _SyncBatchNormBackward.apply(grad, x, weight, tuple(saved), ctx.process_group, ctx.needs_input_grad[:3])
        return (*grads, *[None] * 6)

    _functions.SyncBatchNorm.backward = staticmethod(backward)  # type: ignore[method-assign]
