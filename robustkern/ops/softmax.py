"""softmax_double_backward: the second derivative of softmax and log_softmax."""

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


@register_derivative(reference.softmax_double_backward)
def _(u, grad, output, log, need_grad, need_output):  # type: ignore[no-untyped-def]
    return tuple(output.new_empty(output.shape) if needed else nothing(output) for needed in (need_grad, need_output))
