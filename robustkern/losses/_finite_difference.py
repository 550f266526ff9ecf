"""The gradient penalty by finite differences, and how far it is from the exact one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype
from robustkern._input_gradient import input_gradient


class EstimatorError(NamedTuple):
    """How far the finite-difference estimate of a penalty is from the exact one."""

    h: float  # step, in units of eps
    value: float  # estimated smoothness term
    exact: float  # exact one
    value_error: float  # relative error of the value
    gradient_error: float  # relative L2 error of the gradient in the parameters


def difference_quotient(
    loss_of: Callable[[Tensor], Tensor], loss: Tensor, x: Tensor, p: float, eps: float | Tensor, h: float
) -> Tensor:
    """(loss_i(x_i + h eps * u_i) - loss_i(x_i)) / h, u the direction in which eps * gradient attains its p norm: [B].

    Args:
        loss_of: images to losses [B].
        loss: its value at x, with its graph, which is kept.
        x: a leaf.
        p: p of the norm.
        eps: a number or one value per channel.
        h: step.
    """
    with torch.enable_grad():
        grad = input_gradient("GradientPenalty", "loss", loss.sum(), x, create_graph=False)
    with torch.no_grad():
        scale = _per_channel(eps, x)
        probe = x + (h * scale * _dual(scale * grad, p)).to(x.dtype)
    return (loss_of(probe) - loss) / h


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
