"""activation_double_backward: the second derivative of gelu, silu, mish, softplus, elu, hardswish, tanh and sigmoid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._double_backward import DoubleBackwardSample, nothing, register_double_backward
from robustkern.ops._samples import make_tensor


def _fake(
    gg_x: Tensor, grad: Tensor, x: Tensor, function: str, parameters: Sequence[float], need_grad: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if need_grad else nothing(x), torch.empty_like(x) if need_x else nothing(x)


FUNCTIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "gelu": ("gelu", ()),
    "gelu, tanh": ("gelu_tanh", ()),
    "silu": ("silu", ()),
    "mish": ("mish", ()),
    "softplus": ("softplus", (1.0, 20.0)),
    "softplus, beta and threshold": ("softplus", (2.5, 1.5)),
    "elu": ("elu", (1.0, 1.0, 1.0, 0.0)),
    "elu, selu": ("elu", (1.6732632423543772, 1.0507009873554805, 1.0, 0.0)),
    "elu, celu": ("elu", (0.5, 1.0, 2.0, 0.0)),
    "elu of the result": ("elu", (1.5, 0.75, 1.25, 1.0)),
    "hardswish": ("hardswish", ()),
    "tanh": ("tanh", ()),
    "sigmoid": ("sigmoid", ()),
}


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[DoubleBackwardSample]:
    """Calls that exercise every function, option, shape class and layout."""
    make = make_tensor(device, dtype)

    def sample(
        name: str, gg_x: Tensor, grad: Tensor, x: Tensor, key: str = "gelu", needs: tuple[bool, bool] = (True, True)
    ) -> DoubleBackwardSample:
        function, parameters = FUNCTIONS[key]
        arguments = {"gg_x": gg_x, "grad": grad, "x": x, "function": function, "parameters": list(parameters)}
        return DoubleBackwardSample(name, {**arguments, "need_grad": needs[0], "need_x": needs[1]})

    for key, (function, _) in FUNCTIONS.items():
        x = 3 * make(2, 3, 5, 7)
        x = x.tanh() if function == "tanh" else x.sigmoid() if function == "sigmoid" else x
        yield sample(key, make(2, 3, 5, 7), make(2, 3, 5, 7), x, key)
    last = torch.channels_last
    yield sample("gg_grad only", make(33), make(33), make(33), needs=(True, False))
    yield sample("grad_x only", make(33), make(33), make(33), needs=(False, True))
    yield sample("channels_last", *(make(2, 3, 5, 4).to(memory_format=last) for _ in range(3)), key="silu")
    yield sample("grad in another layout", make(2, 3, 5, 4), make(2, 3, 5, 4).to(memory_format=last), make(2, 3, 5, 4))
    yield sample("x in another layout", make(2, 3, 5, 4), make(2, 3, 5, 4), make(2, 3, 5, 4).to(memory_format=last))
    yield sample("transposed", *(make(6, 9).t() for _ in range(3)), key="mish")
    yield sample("strided", make(6, 18)[:, ::2], make(6, 18)[1:, ::2].new_ones(6, 9), make(6, 18)[:, 1::2])
    yield sample("expanded grad", make(6, 9), make(6, 1).expand(6, 9), make(6, 9))
    yield sample("unaligned", make(302)[1:], make(303)[2:], make(304)[3:])
    yield sample("several pieces", make(5000), make(5000), make(5000), "gelu, tanh")
    yield sample("a number", *(make(1).squeeze() for _ in range(3)))
    yield sample("empty", make(0, 4), make(0, 4), make(0, 4))


register_double_backward(
    "activation_double_backward", ("gg_grad", "grad_x"), _fake, reference.activation_double_backward, samples
)
