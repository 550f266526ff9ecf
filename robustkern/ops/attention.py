"""attention_double_backward: the second derivative of attention, as `robustkern.install()` puts it into PyTorch."""

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _like(tensor: Tensor, needed: bool) -> Tensor:
    result = torch.empty_like(tensor) if needed else nothing(tensor)
    return result if not needed or tensor.shape[3] <= 1 or result.stride(3) == 1 else tensor.new_empty(tensor.shape)


@register_derivative(reference.attention_double_backward)
def _(a, b, c, grad, q, k, v, out, logsumexp, mask, causal, scale,  # type: ignore[no-untyped-def]
      need_grad, need_q, need_k, need_v):  # fmt: skip
    return _like(grad, need_grad), _like(q, need_q), _like(k, need_k), _like(v, need_v)
