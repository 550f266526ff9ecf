"""group_norm: first and second derivative of F.group_norm, which `robustkern.install()` uses."""

from __future__ import annotations

from torch import Tensor

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative, vector


def _like(x: Tensor, needed: bool) -> Tensor:
    if not needed:
        return nothing(x)
    n, c, s = x.shape
    innermost = not x.is_contiguous() and x.transpose(1, 2).is_contiguous()  # channels last: [N, S, C] in memory
    return x.new_empty([n, s, c]).transpose(1, 2) if innermost else x.new_empty([n, c, s])


@register_derivative(reference.group_norm_backward)
def _(grad, x, weight, mean, rstd, groups, need_x, need_weight, need_bias):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    return _like(x, need_x), vector(x, channels, need_weight), vector(x, channels, need_bias)


@register_derivative(reference.group_norm_double_backward)
def _(u, a, b, grad, x, weight, mean, rstd, groups, need_grad, need_x, need_weight):  # type: ignore[no-untyped-def]
    return _like(x, need_grad), _like(x, need_x), vector(x, x.shape[1], need_weight)
