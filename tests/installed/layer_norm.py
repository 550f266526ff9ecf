"""LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case


def _inputs(*shape: int, affine: int = 2, normalized: int = 1, transposed: bool = False) -> Callable:
    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if transposed:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        vectors = torch.randn(2, *shape[-normalized:], generator=generator, dtype=torch.float64).to(dtype)
        return (x, *(1.5 + vectors[0], vectors[1])[:affine])

    return make


def _layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _plane_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-2:], weight, bias, 1e-3)


def _rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def _plane_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-2:], weight, 1e-3)


def _composed(function: Callable) -> Callable:
    """A layer norm with a third derivative that PyTorch gets right: its own treats mean and deviation as constants."""

    def compose(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        dims, eps = ((-1,), 1e-5) if function is _layer_norm else ((-2, -1), 1e-3)
        centred = x - x.mean(dims, keepdim=True)
        y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return compose


CASES = [
    Case("LayerNorm", _layer_norm, _inputs(3, 5), third=_composed(_layer_norm)),
    Case("LayerNorm of tokens", _layer_norm, _inputs(2, 3, 4), third=_composed(_layer_norm)),
    Case("LayerNorm, transposed", _layer_norm, _inputs(2, 3, 4, transposed=True), third=_composed(_layer_norm)),
    Case("LayerNorm without weight", _layer_norm, _inputs(4, 5, affine=0), third=_composed(_layer_norm)),
    Case("LayerNorm without bias", _layer_norm, _inputs(4, 5, affine=1), third=_composed(_layer_norm)),
    Case("LayerNorm of planes", _plane_norm, _inputs(2, 2, 3, normalized=2), third=_composed(_plane_norm)),
    Case("RMSNorm", _rms_norm, _inputs(3, 5, affine=1)),
    Case("RMSNorm of tokens", _rms_norm, _inputs(2, 3, 4, affine=1)),
    Case("RMSNorm without weight", _rms_norm, _inputs(4, 5, affine=0)),
    Case("RMSNorm of planes", _plane_rms_norm, _inputs(2, 2, 3, affine=1, normalized=2)),
]
