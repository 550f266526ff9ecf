"""Activations with a second derivative of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case


def inputs(*shape: int, scale: float = 2.0, layout: torch.memory_format = torch.contiguous_format) -> Callable:
    """One input of this shape, the same one each time."""

    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (x.to(dtype=dtype, memory_format=layout),)

    return make


def in_place(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` of something that it may overwrite, together with what came before."""

    def apply(x: Tensor) -> Tensor:
        y = x * 1.5
        y = y * y.detach().sign()  # a result that nobody needs for its own backward
        return function(y + 0.25)

    return apply


def in_place_on_view(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` on one half of a tensor, all of which is used afterwards."""

    def apply(x: Tensor) -> Tensor:
        y = x + 0.25
        function(y[:2])
        return y * 2.0

    return apply


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus, beta and threshold": lambda x: F.softplus(x, 2.5, 1.5),
    "elu": F.elu,
    "elu, alpha": lambda x: F.elu(x, 0.5),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "celu, negative alpha": lambda x: F.celu(x, -0.75),
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
CASES = [
    *(Case(name, function, inputs(4, 3, 5)) for name, function in FUNCTIONS.items()),
    Case("silu, channels_last", F.silu, inputs(2, 3, 4, 5, layout=torch.channels_last)),
    Case("gelu of a transposed input", lambda x: F.gelu(x.t()), inputs(3, 7)),
    Case("gelu of a strided input", lambda x: F.gelu(x[:, ::2]), inputs(3, 7)),
    Case("gelu of an expanded input", lambda x: F.gelu(x.expand(4, 3, 7)), inputs(3, 7)),
    Case("gelu, its result summed", lambda x: F.gelu(x).sum(0), inputs(3, 7)),
    Case("mish of a number", F.mish, inputs()),
    Case("silu of nothing", F.silu, inputs(0, 3)),
    *(
        Case(f"{name} in place", in_place(function), inputs(4, 3, 5))
        for name, function in {
            "silu": lambda x: F.silu(x, inplace=True),
            "mish": lambda x: F.mish(x, inplace=True),
            "elu": lambda x: F.elu(x, 0.5, inplace=True),
            "selu": lambda x: F.selu(x, inplace=True),
            "celu": lambda x: F.celu(x, 0.5, inplace=True),
            "tanh": torch.tanh_,
            "sigmoid": torch.sigmoid_,
        }.items()
    ),
    Case("silu in place on a view", in_place_on_view(lambda x: F.silu(x, inplace=True)), inputs(4, 3, 5)),
    Case("swiglu", lambda x: F.silu(x[:, :3]) * x[:, 3:], inputs(2, 6)),
    Case("log of a sigmoid", F.logsigmoid, inputs(4, 3, 5)),
]
