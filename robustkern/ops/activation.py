"""activation_double_backward: the second derivative of gelu, silu, mish, softplus, elu, hardswish, tanh and sigmoid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _fake(
    gg_x: Tensor, grad: Tensor, x: Tensor, function: str, parameters: Sequence[float], need_grad: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    gg_grad = torch.empty_like(x) if gg_x.dim() == x.dim() else x.new_empty(gg_x.shape)
    grad_x = torch.empty_like(x) if gg_x.dim() == x.dim() else x.new_empty(x.shape)
    return gg_grad if need_grad else nothing(x), grad_x if need_x else nothing(x)


register_derivative("activation_double_backward", ("gg_grad", "grad_x"), _fake, reference.activation_double_backward)
