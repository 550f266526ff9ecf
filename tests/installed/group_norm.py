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


def _composed(groups: int) -> Callable[..., Tensor]:
    """The same where PyTorch crashes: in the gradients of weight and bias alone, for channels_last images."""

    def compose(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], groups, -1)
        centred = rows - rows.mean(2, keepdim=True)
        normalized = centred * (centred.square().mean(2, keepdim=True) + 1e-5).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return normalized.reshape(x.shape) * weight.view(shape) + bias.view(shape)

    return compose


CASES = [
    Case("GroupNorm", _groups(2), _inputs(2, 4, 2, 3)),
    Case(
        "GroupNorm, channels_last",
        _groups(2),
        _inputs(2, 4, 2, 3, layout=torch.channels_last),
        _composed(2),
        crashes=True,
    ),
    Case("GroupNorm without weight", _groups(2), _inputs(2, 4, 2, 2, affine=False)),
    Case("GroupNorm of one group", _groups(1), _inputs(2, 3, 2, 2)),
    Case(
        "GroupNorm of single channels",
        _groups(3),
        _inputs(2, 3, 2, 2, layout=torch.channels_last),
        _composed(3),
        crashes=True,
    ),
    Case("GroupNorm of features", _groups(2), _inputs(3, 8)),
    Case("GroupNorm of sequences", _groups(2), _inputs(2, 4, 3)),
    Case("GroupNorm of volumes", _groups(2), _inputs(2, 4, 2, 1, 2)),
    Case(
        "GroupNorm of volumes, channels_last",
        _groups(2),
        _inputs(2, 4, 2, 1, 2, layout=torch.channels_last_3d),
        _composed(2),
        crashes=True,
    ),
]
