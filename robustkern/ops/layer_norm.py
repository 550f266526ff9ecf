"""layer_norm: first and second derivative of F.layer_norm and F.rms_norm, which `robustkern.install()` uses."""

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative, vector


@register_derivative(reference.layer_norm_backward)
def _(grad, x, weight, mean, rstd, need_x, need_weight, need_bias):  # type: ignore[no-untyped-def]
    columns = x.shape[1]
    grad_x = x.new_empty(grad.shape) if need_x else nothing(x)
    return grad_x, vector(x, columns, need_weight), vector(x, columns, need_bias)


@register_derivative(reference.layer_norm_double_backward)
def _(u, a, b, grad, x, weight, mean, rstd, need_grad, need_x, need_weight):  # type: ignore[no-untyped-def]
    gg_grad = x.new_empty(grad.shape) if need_grad else nothing(x)
    grad_x = x.new_empty(x.shape) if need_x else nothing(x)
    return gg_grad, grad_x, vector(x, x.shape[1], need_weight)
