"""BatchNorm and InstanceNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case, images


def _train(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def _running(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    mean, var = torch.zeros_like(x[0].flatten(1)[:, 0]), torch.ones_like(x[0].flatten(1)[:, 0])
    return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, training=True, momentum=0.3)


def _eval(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    channels = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return F.batch_norm(x, 0.1 * channels, channels, weight, bias, training=False).sin()


def _instance(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias)


def _composed(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """_train with a third derivative that PyTorch gets right: its own treats the statistics as constants."""
    dims = [d for d in range(x.dim()) if d != 1]
    return _normalized(x, dims, weight, bias)


def _composed_instance(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return _normalized(x, list(range(2, x.dim())), weight, bias)


def _normalized(x: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + 1e-5).rsqrt()
    channels = [-1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


CASES = [
    Case("BatchNorm2d", _train, images(3, 2, 3, 2), third=_composed),
    Case("BatchNorm2d, channels_last", _train, images(3, 2, 3, 2, layout=torch.channels_last), third=_composed),
    Case("BatchNorm2d without weight", _train, images(3, 2, 3, 2, affine=False), third=_composed),
    Case("BatchNorm2d, running statistics", _running, images(2, 3, 2, 2), third=_composed),
    Case("BatchNorm1d", _train, images(6, 3), third=_composed),
    Case("BatchNorm1d of sequences", _train, images(3, 2, 4), third=_composed),
    Case("BatchNorm3d", _train, images(2, 2, 2, 1, 3), third=_composed),
    Case("BatchNorm3d, channels_last", _train, images(2, 2, 2, 1, 3, layout=torch.channels_last_3d), third=_composed),
    Case("BatchNorm2d, evaluation", _eval, images(3, 2, 3, 2)),
    Case("BatchNorm2d, evaluation, channels_last", _eval, images(3, 2, 3, 2, layout=torch.channels_last)),
    Case("BatchNorm2d, evaluation without weight", _eval, images(3, 2, 3, 2, affine=False)),
    Case("InstanceNorm2d", _instance, images(2, 2, 3, 2), third=_composed_instance),
    Case("InstanceNorm1d without weight", _instance, images(2, 2, 5, affine=False), third=_composed_instance),
]
