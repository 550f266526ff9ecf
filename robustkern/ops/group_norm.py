"""group_norm: first and second derivative of F.group_norm, which `robustkern.install()` uses."""

from __future__ import annotations

from torch import Tensor

from robustkern import reference
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _like(x: Tensor, needed: bool) -> Tensor:
    if not needed:
        return nothing(x)
    n, c, s = x.shape
    if channels_innermost(x):
        return x.new_empty([n, s, c]).transpose(1, 2)
    return x.new_empty([n, c, s])


def channels_innermost(x: Tensor) -> bool:
    """Whether x lies in memory as [N, S, C]."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def _vector(like: Tensor, size: int) -> Tensor:
    return like.new_empty([size], dtype=accumulation_dtype(like.dtype))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    channels = x.shape[1]
    return _like(x, need_x), _vector(x, channels if need_weight else 0), _vector(x, channels if need_bias else 0)


def _fake_double_backward(
    gg_x: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    need_grad: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    return _like(x, need_grad), _like(x, need_x), _vector(x, x.shape[1] if need_weight else 0)


register_derivative(
    "group_norm_backward",
    ("grad_x", "grad_weight", "grad_bias"),
    _fake_backward,
    reference.group_norm_backward,
)
register_derivative(
    "group_norm_double_backward",
    ("gg_grad", "grad_x", "grad_weight"),
    _fake_double_backward,
    reference.group_norm_double_backward,
)
