"""Functions whose slope is piecewise constant.  The square behind each leaves a second derivative to compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case
from tests.installed.activation import in_place, inputs


def squared(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x -> function(x)^2"""
    return lambda x: function(x).square()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "threshold": lambda x: F.threshold(x, 0.5, -1.0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu, negative slope": lambda x: F.leaky_relu(x, -0.2),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 1.5),
    "hardshrink": lambda x: F.hardshrink(x, 0.75),
    "softshrink": lambda x: F.softshrink(x, 0.75),
    "prelu": lambda x: F.prelu(x, x.new_tensor([0.25])),
}
CASES = [
    *(Case(name, squared(function), inputs(3, 2, 2, scale=3.0)) for name, function in FUNCTIONS.items()),
    Case("relu, channels_last", squared(F.relu), inputs(2, 3, 2, 2, layout=torch.channels_last)),
    Case("relu of relu", squared(lambda x: F.relu(F.relu(x) - 1.0)), inputs(3, 4)),
    Case("relu alone", lambda x: F.relu(x) * x, inputs(3, 4)),
    *(
        Case(f"{name} in place", squared(in_place(function)), inputs(3, 2, 2))
        for name, function in {
            "relu": lambda x: F.relu(x, inplace=True),
            "relu6": lambda x: F.relu6(x, inplace=True),
            "leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
            "hardtanh": lambda x: F.hardtanh(x, inplace=True),
        }.items()
    ),
]
