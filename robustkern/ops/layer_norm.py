"""layer_norm: first and second derivative of F.layer_norm and F.rms_norm, which `robustkern.install()` uses."""

from __future__ import annotations

from torch import Tensor

from robustkern import reference
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _vector(like: Tensor, size: int) -> Tensor:
    return like.new_empty([size], dtype=accumulation_dtype(like.dtype))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    columns = x.shape[1]
    return (
        x.new_empty(grad.shape) if need_x else nothing(x),
        _vector(x, columns if need_weight else 0),
        _vector(x, columns if need_bias else 0),
    )


def _fake_double_backward(
    gg_x: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    need_grad: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(grad.shape) if need_grad else nothing(x),
        x.new_empty(x.shape) if need_x else nothing(x),
        _vector(x, x.shape[1] if need_weight else 0),
    )


register_derivative(
    "layer_norm_backward",
    ("grad_x", "grad_weight", "grad_bias"),
    _fake_backward,
    reference.layer_norm_backward,
)
register_derivative(
    "layer_norm_double_backward",
    ("gg_grad", "grad_x", "grad_weight"),
    _fake_double_backward,
    reference.layer_norm_double_backward,
)
