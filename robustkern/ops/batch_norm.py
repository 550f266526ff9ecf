"""batch_norm_double_backward: the second derivative of BatchNorm, as `robustkern.install()` puts it into PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _fake(
    gg_x: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    need_grad: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(grad.shape) if need_grad else nothing(x),
        x.new_empty(x.shape) if need_x else nothing(x),
        torch.empty_like(mean, memory_format=torch.contiguous_format) if need_weight else nothing(mean),
    )


register_derivative(
    "batch_norm_double_backward",
    ("gg_grad", "grad_x", "grad_weight"),
    _fake,
    reference.batch_norm_double_backward,
)
