"""attention_double_backward: the second derivative of attention, as `robustkern.install()` puts it into PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _fake(
    gg_q: Tensor | None,
    gg_k: Tensor | None,
    gg_v: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    need_grad: bool,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        result = torch.empty_like(tensor)
        return result if tensor.shape[3] <= 1 or result.stride(3) == 1 else tensor.new_empty(tensor.shape)

    return (
        like(grad) if need_grad else nothing(grad),
        like(q) if need_q else nothing(q),
        like(k) if need_k else nothing(k),
        like(v) if need_v else nothing(v),
    )


register_derivative(
    "attention_double_backward",
    ("gg_grad", "grad_q", "grad_k", "grad_v"),
    _fake,
    reference.attention_double_backward,
)
