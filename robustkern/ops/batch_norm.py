"""batch_norm_double_backward: the second derivative of BatchNorm, as `robustkern.install()` puts it into PyTorch."""

import torch

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


@register_derivative(reference.batch_norm_double_backward)
def _(u, a, b, grad, x, weight, mean, invstd, training, need_grad, need_x, need_weight):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(grad.shape) if need_grad else nothing(x),
        x.new_empty(x.shape) if need_x else nothing(x),
        torch.empty_like(mean, memory_format=torch.contiguous_format) if need_weight else nothing(mean),
    )
