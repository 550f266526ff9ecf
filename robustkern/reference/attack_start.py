"""attack_start in plain PyTorch, from the same random bits as the kernels."""

import torch
from torch import Tensor

from robustkern._choices import Norm
from robustkern._dtypes import accumulation_dtype
from robustkern.reference.attack_step import as_number, round_between
from robustkern.reference.random_cotangents import _box_muller, draw_seed, philox

_MASK = 0xFFFFFFFF


def _words(seed: Tensor, samples: Tensor, blocks: int, stream: int) -> Tensor:  # [B, blocks, 4]
    block = torch.arange(blocks, device=seed.device)
    counter = (block, samples[:, None] & _MASK, (samples[:, None] >> 32) & _MASK, torch.full_like(seed, stream))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), -1)


def _symmetric(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform in (-1, 1): an odd number of 2^-24, the same in every dtype."""
    signed = torch.where(words >= 2**31, words - 2**32, words) >> 8
    return (2 * signed + 1).to(dtype) * 2.0**-24


def _unit_interval(words: Tensor, dtype: torch.dtype) -> Tensor:
    return ((words >> 8) | 1).to(dtype) * 2.0**-24


def _direction(words: Tensor, size: int, norm: Norm, dtype: torch.dtype) -> Tensor:  # [B, size], length 1
    if norm == "l2":
        normals = torch.cat([_box_muller(words[..., :2], dtype), _box_muller(words[..., 2:], dtype)], -1)
        flat = normals.flatten(1)[:, :size]
        return flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    flat = words.flatten(1)[:, :size]
    lengths = -_unit_interval(flat, dtype).log()
    return (1 - 2 * (flat & 1)).to(dtype) * lengths / lengths.sum(1, keepdim=True)


def attack_start(
    x: Tensor,  # [B, ...]
    *,
    eps: Tensor | float,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,  # [1] int64
    samples: Tensor | None = None,  # [B] int64
    restart: int = 0,
) -> Tensor:  # like x
    """x' = clamp(x + uniform in the ball, 0, 1); see `robustkern.ops.attack_start`.

    >>> rk.reference.attack_start(torch.full((2, 3), 0.5), eps=0.25).shape
    torch.Size([2, 3])
    """
    seed = draw_seed(x, generator) if seed is None else seed.reshape(1)
    samples = torch.arange(len(x), device=x.device) if samples is None else samples
    dtype = accumulation_dtype(x.dtype)
    with torch.no_grad():
        clean, size = x.to(dtype), x.shape[1:].numel()
        eps = as_number(eps, clean)
        words = _words(seed, samples, (size + 3) // 4, 2 * restart)
        if norm == "linf":
            offset = _symmetric(words.flatten(1)[:, :size], dtype)
        else:
            # The radius of a uniformly distributed point: u^(1/N).
            u = _unit_interval(_words(seed, samples, 1, 2 * restart + 1)[:, 0, :1], dtype)
            offset = _direction(words, size, norm, dtype) * (u.log() / max(size, 1)).exp()
        start = (clean + eps * offset.view(x.shape)).clamp(0.0, 1.0)
        if norm == "linf":
            low, high = (clean - eps).clamp(min=0.0), (clean + eps).clamp(max=1.0)
            start = start.clamp(low, high)
        else:
            low, high = torch.minimum(start, clean), torch.maximum(start, clean)
        return torch.empty_like(x).copy_(round_between(start, low, high, x.dtype))
