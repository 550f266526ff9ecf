"""softmax and log_softmax over any dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.installed import Case
from tests.installed.activation import inputs


def temperature(x: Tensor) -> Tensor:
    """Both kinds in sequence."""
    return torch.log_softmax(torch.softmax(x, 1) * 4, 1)


CASES = [
    *(
        Case(f"{function.__name__}, dim {dim} of {len(shape)}", lambda x, f=function, d=dim: f(x, d), inputs(*shape))
        for function in (torch.softmax, torch.log_softmax)
        for shape in ((4,), (3, 4), (2, 3, 2, 2))
        for dim in range(-1, len(shape) - 1)
    ),
    Case(
        "log_softmax, channels_last", lambda x: torch.log_softmax(x, 1), inputs(2, 3, 2, 2, layout=torch.channels_last)
    ),
    Case("softmax of a transposed input", lambda x: torch.softmax(x.t(), 1), inputs(3, 4)),
    Case("log_softmax of one class", lambda x: torch.log_softmax(x, 1) + x, inputs(3, 1)),
    Case("softmax behind softmax", temperature, inputs(3, 4)),
    Case("log_softmax in float64", lambda x: torch.log_softmax(x, 1, dtype=torch.float64), inputs(3, 4), half=False),
    Case("softmax of a number", lambda x: torch.softmax(x, 0) * x, inputs()),
]
