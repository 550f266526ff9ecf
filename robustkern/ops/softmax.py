"""softmax_double_backward: the second derivative of softmax and log_softmax."""

from __future__ import annotations

from torch import Tensor

from robustkern import reference
from robustkern.ops._pytorch_derivatives import nothing, register_derivative


def _fake(
    gg_x: Tensor, grad: Tensor, output: Tensor, log: bool, need_grad: bool, need_output: bool
) -> tuple[Tensor, Tensor]:
    def result(needed: bool) -> Tensor:
        return output.new_empty(output.shape) if needed else nothing(output)

    return result(need_grad), result(need_output)


register_derivative("softmax_double_backward", ("gg_grad", "grad_output"), _fake, reference.softmax_double_backward)
