"""activation_double_backward: the second derivative of gelu, silu, mish, softplus, elu, hardswish, tanh and sigmoid."""

import torch

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


@register_derivative(reference.activation_double_backward)
def _(u, grad, x, function, parameters, need_grad, need_x):  # type: ignore[no-untyped-def]
    gg_grad = torch.empty_like(x) if u.dim() == x.dim() else x.new_empty(u.shape)
    grad_x = torch.empty_like(x) if u.dim() == x.dim() else x.new_empty(x.shape)
    return gg_grad if need_grad else nothing(x), grad_x if need_x else nothing(x)
