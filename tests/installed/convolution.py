"""Convolutions of every kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case


def _inputs(x: tuple[int, ...], weight: tuple[int, ...], bias: int = 0, last: bool = False) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        image, kernel = normal(*x), 0.5 * normal(*weight)
        if last:
            layout = torch.channels_last if len(x) == 4 else torch.channels_last_3d
            image, kernel = image.contiguous(memory_format=layout), kernel.contiguous(memory_format=layout)
        return (image, kernel, normal(bias)) if bias else (image, kernel)

    return make


CASES = [
    Case("Conv2d", F.conv2d, _inputs((2, 3, 4, 4), (2, 3, 3, 3), 2)),
    Case("Conv2d, channels_last", partial(F.conv2d, padding=1), _inputs((2, 3, 3, 3), (2, 3, 3, 3), last=True)),
    Case("Conv2d, stride 2", partial(F.conv2d, stride=2, padding=1), _inputs((1, 2, 6, 5), (3, 2, 3, 3))),
    Case("Conv2d, dilation", partial(F.conv2d, dilation=2, padding=(1, 2)), _inputs((1, 2, 5, 4), (2, 2, 3, 3), 2)),
    Case("Conv2d, groups", partial(F.conv2d, groups=2), _inputs((2, 4, 3, 3), (2, 2, 2, 2), 2)),
    Case("Conv2d, depthwise", partial(F.conv2d, padding=1, groups=3), _inputs((2, 3, 3, 3), (3, 1, 3, 3), last=True)),
    Case("Conv2d, patches", partial(F.conv2d, stride=(2, 3)), _inputs((2, 3, 4, 7), (3, 3, 2, 3), 3, last=True)),
    Case("Conv2d, 1x1", F.conv2d, _inputs((2, 3, 2, 2), (4, 3, 1, 1))),
    Case("Conv1d", partial(F.conv1d, stride=2, padding=1), _inputs((2, 2, 6), (3, 2, 3), 3)),
    Case("Conv3d", partial(F.conv3d, padding=(1, 0, 0)), _inputs((1, 2, 2, 3, 3), (2, 2, 2, 2, 2), 2)),
    Case(
        "ConvTranspose2d",
        partial(F.conv_transpose2d, stride=2, padding=1, output_padding=1),
        _inputs((1, 2, 3, 3), (2, 3, 3, 3), 3),
    ),
    Case("ConvTranspose2d, groups", partial(F.conv_transpose2d, groups=2), _inputs((1, 4, 2, 2), (4, 1, 2, 2))),
    Case("ConvTranspose1d", partial(F.conv_transpose1d, dilation=2), _inputs((1, 2, 3), (2, 2, 2), 2)),
]
