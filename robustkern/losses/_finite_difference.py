"""The gradient penalty by finite differences, and how far it is from the exact one."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype
from robustkern._graph import graph_nodes
from robustkern._input_gradient import depends, input_gradient


class EstimatorError(NamedTuple):
    """How far the finite-difference estimate of a penalty is from the exact one."""

    h: float  # step, in units of eps
    value: float  # estimated smoothness term
    exact: float  # exact one
    value_error: float  # relative error of the value
    gradient_error: float  # relative L2 error of the gradient in the parameters


def finite_difference(
    loss_of: Callable[[Tensor], Tensor],
    again: Callable[[], AbstractContextManager[object]],
    x: Tensor,
    p: float,
    eps: float | Tensor,
    h: float,
    squared: bool,
) -> tuple[Tensor, Tensor]:
    """mean_i loss_i(x), and the mean of the norm ||eps * d loss_i / d x_i||_p by a finite difference of losses.

    Each of the two passes builds a graph.  The first one is differentiated in x and in all else that requires grad, and
    freed, before the second is built; its gradients wait for the backward pass, which may be taken once, twice with
    retain_graph, and not with create_graph.  The direction is not differentiated.  A step that torch.compile traces
    holds both graphs.

    Args:
        loss_of: images to losses [B].
        again: a context in which loss_of is the same function as in the first pass.
        x: a leaf that requires grad.
        p: p of the norm.
        eps: a number or one value per channel.
        h: step, in units of eps.
        squared: the squared norm.  One step for the batch then, h eps long in the mean: each image moves in proportion
            to its gradient.
    """
    losses, loss, grad = _loss_and_gradient(loss_of, x)
    with torch.no_grad():
        scale = _per_channel(eps, x)
        moved = scale * grad if squared else _dual(scale * grad, p)  # in units of eps
        step: float | Tensor = h
        if squared:
            length = torch.linalg.vector_norm(moved.to(accumulation_dtype(x.dtype))) / len(x) ** 0.5
            step = torch.where(length > 0, h / length, h)
        probe = x + (step * scale * moved).to(x.dtype)
    with again():
        # Sample by sample, where fewer digits are lost; the mean brings the gradient.
        quotient = ((loss_of(probe) - losses).mean() - (loss - loss.detach())) / step
    # <v, g> with v = eps^2 g held fixed: its derivative is half of that of the squared norm.
    return loss, 2 * quotient - quotient.detach() if squared else quotient


def _loss_and_gradient(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss_i(x), their mean with its gradients in place of its graph, and the gradient of their sum in x."""
    with torch.enable_grad():
        losses = loss_of(x)
        total = losses.sum()
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler sees to memory by itself
        grad = input_gradient("GradientPenalty", "loss", total, x, create_graph=False)
        return losses.detach(), losses.mean(), grad
    reached = [getattr(node, "variable", None) for node in graph_nodes(total)]
    leaves = [leaf for leaf in reached if isinstance(leaf, Tensor)]
    # Retained, since the second pass may share a part of the graph; the rest is freed with `losses`.
    grads = torch.autograd.grad(total, [x, *leaves], retain_graph=True, allow_unused=True)
    loss = _WithGradient.apply(losses.detach().mean(), [g if g is None else g / len(x) for g in grads[1:]], *leaves)
    return losses.detach(), loss, depends("GradientPenalty", "loss", grads[0])


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradients in some leaves are known already."""

    @staticmethod
    def forward(ctx, value, gradients, *leaves):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError("GradientPenalty: its finite difference is differentiable once, not with create_graph")
        return (None, None, *(None if known is None else grad * known for known in ctx.gradients))


def _per_channel(eps: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(eps, Tensor) or eps.numel() == 1:
        return float(eps)
    return eps.to(x).reshape(1, -1, *[1] * (x.dim() - 2))


def _dual(w: Tensor, p: float) -> Tensor:
    """u_i with ||u_i||_q = 1 and <u_i, w_i> = ||w_i||_p, 1/p + 1/q = 1; 0 where w_i is 0."""
    if p == 1.0:
        return w.sign()
    flat = w.flatten(1).to(accumulation_dtype(w.dtype))
    largest = flat.abs().amax(1, keepdim=True)
    share = flat.abs() / torch.where(largest > 0, largest, 1.0)
    if math.isinf(p):
        powers = (share == 1).to(flat.dtype)
        length = powers.sum(1, keepdim=True)
    else:
        powers = share ** (p - 1.0)
        length = (share**p).sum(1, keepdim=True) ** ((p - 1.0) / p)
    return (flat.sign() * powers / length.clamp(min=1.0)).view_as(w)
