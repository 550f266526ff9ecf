"""Pooling of every kind.  The square behind each leaves a second derivative to compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case
from tests.installed.activation import inputs
from tests.installed.piecewise_linear import squared

LAST = torch.channels_last
ONE, TWO, THREE = (1, 2, 7), (1, 2, 5, 4), (1, 1, 3, 4, 3)

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), ONE),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), TWO),
    "max_pool2d, ceil_mode": (lambda x: F.max_pool2d(x, 2, ceil_mode=True), TWO),
    "max_pool2d, overlapping and padded": (lambda x: F.max_pool2d(x, 3, 2, 1), TWO),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, (2, 3), 1, (1, 1), dilation=(1, 2)), TWO),
    "max_pool2d of one image": (lambda x: F.max_pool2d(x, 2), (2, 5, 4)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2, ceil_mode=True), THREE),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), ONE),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), TWO),
    "avg_pool2d, padded": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), TWO),
    "avg_pool2d, divisor": (lambda x: F.avg_pool2d(x, (2, 3), 1, divisor_override=5), TWO),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2, 1, 1), THREE),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 4), ONE),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), TWO),
    "adaptive_avg_pool2d to one": (lambda x: F.adaptive_avg_pool2d(x, 1), TWO),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, (2, 3, 2)), THREE),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 4), ONE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, 2)), TWO),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, (2, 3, 2)), THREE),
}
CASES = [
    *(Case(name, squared(function), inputs(*shape)) for name, (function, shape) in FUNCTIONS.items()),
    *(
        Case(f"{name}, channels_last", squared(function), inputs(*shape, layout=LAST))
        for name, (function, shape) in FUNCTIONS.items()
        if len(shape) == 4
    ),
]
