"""GroupNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case


def _inputs(*shape: int, affine: bool = True, layout: torch.memory_format = torch.contiguous_format) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
        weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64).to(dtype)
        return (x, 1.5 + weight, bias) if affine else (x,)

    return make


def _groups(groups: int) -> Callable[..., Tensor]:
    def group_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(x, groups, weight, bias)

    return group_norm


CASES = [
    Case("GroupNorm", _groups(2), _inputs(2, 4, 2, 3)),
    Case("GroupNorm, channels_last", _groups(2), _inputs(2, 4, 2, 3, layout=torch.channels_last)),
    Case("GroupNorm without weight", _groups(2), _inputs(2, 4, 2, 2, affine=False)),
    Case("GroupNorm of one group", _groups(1), _inputs(2, 3, 2, 2)),
    Case("GroupNorm of single channels", _groups(3), _inputs(2, 3, 2, 2, layout=torch.channels_last)),
    Case("GroupNorm of features", _groups(2), _inputs(3, 8)),
    Case("GroupNorm of sequences", _groups(2), _inputs(2, 4, 3)),
    Case("GroupNorm of volumes", _groups(2), _inputs(2, 4, 2, 1, 2)),
    Case("GroupNorm of volumes, channels_last", _groups(2), _inputs(2, 4, 2, 1, 2, layout=torch.channels_last_3d)),
]
