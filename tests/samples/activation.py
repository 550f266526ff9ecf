"""Sample calls of the derivatives of activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tests.samples import DerivativeSample, make_tensor

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


def double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    make = make_tensor(device, dtype)

    def sample(
        name: str,
        tensors: Iterable[Tensor],
        key: str = "gelu",
        needs: tuple[bool, bool] = (True, True),
        zero: tuple[int, ...] = (),
    ) -> DerivativeSample:
        u, grad, x = tensors
        function, parameters = FUNCTIONS[key]
        arguments = {"u": u, "grad": grad, "x": x, "function": function, "parameters": list(parameters)}
        return DerivativeSample(name, {**arguments, "need_grad": needs[0], "need_x": needs[1]}, zero)

    def three(*shape: int) -> list[Tensor]:
        return [make(*shape) for _ in range(3)]

    def last(t: Tensor) -> Tensor:
        return t.to(memory_format=torch.channels_last)

    for key, (function, _) in FUNCTIONS.items():
        u, g, x = three(2, 3, 5, 7)
        x = x.tanh() if function == "tanh" else x.sigmoid() if function == "sigmoid" else 3 * x
        yield sample(key, (u, g, x), key)
    yield sample("gg_grad only", three(33), needs=(True, False))
    yield sample("grad_x only", three(33), needs=(False, True))
    yield sample("channels_last", map(last, three(2, 3, 5, 4)), "silu")
    u, g, x = three(2, 3, 5, 4)
    yield sample("grad in another layout", (u, last(g), x))
    yield sample("x in another layout", (u, g, last(x)))
    yield sample("transposed", (t.t() for t in three(6, 9)), "mish")
    yield sample("strided", (t[:, ::2] for t in three(6, 18)))
    yield sample("expanded grad", (make(6, 9), make(6, 1).expand(6, 9), make(6, 9)))
    yield sample("unaligned", (make(302)[1:], make(303)[2:], make(304)[3:]))
    yield sample("several pieces", three(5000), "gelu, tanh")
    for title, key, shape in (("three", "gelu", (2, 3, 5)), ("three, several pieces", "silu", (2500,))):
        yield sample(f"{title} cotangents", (make(3, *shape), make(3, *shape), make(*shape)), key)
    yield sample("cotangents, gg_grad only", (make(2, 33), make(2, 33), make(33)), "mish", needs=(True, False))
    yield sample("cotangents, grad_x only", (make(2, 33), make(2, 33), make(33)), needs=(False, True))
    yield sample("transposed cotangents", (make(6, 9, 2).mT, make(6, 2, 9), make(9, 2).t()))
    yield sample("one cotangent", (make(1, 4, 5), make(1, 4, 5), make(4, 5)))
    yield sample("no cotangents", (make(0, 4, 5), make(0, 4, 5), make(4, 5)), zero=(1,))
    yield sample("cotangents of nothing", (make(3, 0), make(3, 0), make(0)))
    yield sample("a number", (t.squeeze() for t in three(1)), "softplus")
    yield sample("empty", three(0, 4))
