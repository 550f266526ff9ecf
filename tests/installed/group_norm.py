"""GroupNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case, images


def _groups(groups: int) -> Callable[..., Tensor]:
    def group_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.group_norm(x, groups, weight, bias)

    return group_norm


def _composed(groups: int) -> Callable[..., Tensor]:
    """The same for cases where PyTorch crashes: the gradients of weight and bias alone, for channels_last images."""

    def compose(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], groups, -1)
        centred = rows - rows.mean(2, keepdim=True)
        normalized = centred * (centred.square().mean(2, keepdim=True) + 1e-5).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return normalized.reshape(x.shape) * weight.view(shape) + bias.view(shape)

    return compose


def _channels_last(name: str, groups: int, *shape: int) -> Case:
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    inputs = images(*shape, layout=layout)
    return Case(name, _groups(groups), inputs, _composed(groups), crashes=True)


CASES = [
    Case("GroupNorm", _groups(2), images(2, 4, 2, 3)),
    _channels_last("GroupNorm, channels_last", 2, 2, 4, 2, 3),
    Case("GroupNorm without weight", _groups(2), images(2, 4, 2, 2, affine=False)),
    Case("GroupNorm of one group", _groups(1), images(2, 3, 2, 2)),
    _channels_last("GroupNorm of single channels", 3, 2, 3, 2, 2),
    Case("GroupNorm of features", _groups(2), images(3, 8)),
    Case("GroupNorm of sequences", _groups(2), images(2, 4, 3)),
    Case("GroupNorm of volumes", _groups(2), images(2, 4, 2, 1, 2)),
    _channels_last("GroupNorm of volumes, channels_last", 2, 2, 4, 2, 1, 2),
]
