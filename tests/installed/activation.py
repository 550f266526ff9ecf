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
    """`function` on a tensor that it may overwrite."""
    return lambda x: function(x * 1.5 + 0.25)


def in_place_on_view(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` on one half of a tensor that is then used as a whole."""

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
    *(Case(name, function, inputs(3, 2, 2)) for name, function in FUNCTIONS.items()),
    Case("silu, channels_last", F.silu, inputs(2, 3, 2, 2, layout=torch.channels_last)),
    Case("gelu of a transposed input", lambda x: F.gelu(x.t()), inputs(2, 5)),
    Case("gelu of a strided input", lambda x: F.gelu(x[:, ::2]), inputs(2, 5)),
    Case("gelu of an expanded input", lambda x: F.gelu(x.expand(2, 2, 5)), inputs(2, 5)),
    Case("gelu, its result summed", lambda x: F.gelu(x).sum(0), inputs(2, 5)),
    Case("mish of a number", F.mish, inputs()),
    *(
        Case(f"{name} in place", in_place(function), inputs(3, 2, 2))
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
    Case("silu in place on a view", in_place_on_view(lambda x: F.silu(x, inplace=True)), inputs(3, 2, 2)),
    Case("swiglu", lambda x: F.silu(x[:, :3]) * x[:, 3:], inputs(2, 6)),
    Case("log of a sigmoid", F.logsigmoid, inputs(3, 2, 2)),
]
