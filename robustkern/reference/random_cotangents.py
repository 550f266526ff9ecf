"""random_cotangents in plain PyTorch, from the same random bits as the kernels."""

import math

import torch
from torch import Tensor

from robustkern._choices import Kind, Law
from robustkern._dtypes import accumulation_dtype

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words = Philox4x32-10(counter, key), of Salmon, Moraes, Dror and Shaw (2011).

    Args:
        counter: four 32-bit words, as int64 tensors that broadcast.
        key: two 32-bit words, likewise.
    """

    def multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
        product = factor * word  # wraps around: the 64 bits of the unsigned product
        return (product >> 32) & _MASK, product & _MASK

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(seed: Tensor, batch: int, blocks: int, stream: int) -> Tensor:  # [B, 4 blocks]
    """The random words of each sample, one sequence."""
    block, sample = (torch.arange(n, device=seed.device) for n in (blocks, batch))
    zero = torch.zeros_like(seed)
    counter = (block & _MASK, block >> 32, sample.unsqueeze(1), zero + stream)
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)


def _box_muller(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Two normals from two words [..., 2]: r (cos, sin) with r^2 = -2 log u; neither is ever zero."""
    u = ((words[..., 0] >> 8) | 1).to(dtype) * 2.0**-24
    quarter = words[..., 1] >> 30
    # The other 30 bits as an odd number of 2^-32 turns, at most 1/8 turn to either side.
    odd = (words[..., 1] & 0x3FFFFFFF) * 2
    odd = torch.where(odd >= 2**30, odd - 2**31, odd) | 1
    x = odd.to(dtype) * (math.pi * 2.0**-32)
    cos, sin = x.cos(), x.sin()
    swapped = (quarter & 1).bool()
    first = torch.where(swapped, sin, cos) * (1 - 2 * (((quarter + 1) >> 1) & 1))
    second = torch.where(swapped, cos, sin) * (1 - 2 * (quarter >> 1))
    return (-2.0 * u.log()).sqrt().unsqueeze(-1) * torch.stack([first, second], -1)


def _normals(seed: Tensor, batch: int, count: int, dtype: torch.dtype) -> Tensor:  # [B, count]
    blocks = (count + 3) // 4
    words = _words(seed, batch, blocks, 0).view(batch, 2 * blocks, 2)
    return _box_muller(words, dtype).flatten(1)[:, :count]


def _signs(seed: Tensor, projections: int, batch: int, size: int, dtype: torch.dtype) -> Tensor:  # [K, B, D]
    """Entries +-1 by the bits of the words; a row begins with a word."""
    row = (size + 31) // 32
    words = _words(seed, batch, (projections * row + 3) // 4, 1)[:, : projections * row]
    bits = (words.view(batch, projections, row, 1) >> torch.arange(32, device=seed.device)) & 1
    return (1 - 2 * bits).flatten(2)[..., :size].transpose(0, 1).to(dtype)


def _frames(seed: Tensor, projections: int, batch: int, size: int, dtype: torch.dtype) -> Tensor:  # [K, B, size]
    """The first K columns of Haar-distributed orthogonal matrices (Stewart, 1980).

    The Householder reflections that a QR factorisation of a Gaussian matrix would find are those of independent
    Gaussian vectors of size D, D - 1, ...: nothing needs to be factorised.  The signs make the diagonal of R positive.
    """
    normals = _normals(seed, batch, projections * size - projections * (projections - 1) // 2, dtype)
    frames = torch.eye(size, projections, device=seed.device, dtype=dtype).repeat(batch, 1, 1)
    for k in reversed(range(projections)):
        begin = k * size - k * (k - 1) // 2
        u = normals[:, begin : begin + size - k].clone()
        head, norm = u[:, 0].clone(), torch.linalg.vector_norm(u, dim=1)
        u[:, 0] += torch.copysign(norm, head)
        factor = 1.0 / (norm * (norm + head.abs()))
        block = frames[:, k:, k:]
        # A sum of products: a matrix product would be rounded to 16 bits under autocast.
        block -= (factor[:, None] * u).unsqueeze(2) * (u.unsqueeze(2) * block).sum(1, keepdim=True)
        block[:, :, 0] *= -head.sign()[:, None]
    return frames.permute(2, 0, 1)


def _draws(seed: Tensor, projections: int, batch: int, size: int, law: Law, dtype: torch.dtype) -> Tensor:
    """v [K, B, D] with E[v v^T] = I."""
    if law == "rademacher":
        return _signs(seed, projections, batch, size, dtype)
    if law == "orthonormal":
        return math.sqrt(size) * _frames(seed, projections, batch, size, dtype)
    row = (size + 3) // 4 * 4  # a row begins with a block of four
    normals = _normals(seed, batch, projections * row, dtype).view(batch, projections, row)[..., :size].transpose(0, 1)
    if law == "gaussian":
        return normals
    return normals * (math.sqrt(size) / torch.linalg.vector_norm(normals, dim=2, keepdim=True))


def random_cotangents(
    outputs: Tensor,  # [B, C, ...]
    projections: int,
    *,
    law: Law = "sphere",
    kind: Kind = "plain",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> Tensor:  # [K, B, C, ...]
    """w = v, v - mean(v) or sqrt(p) v - p <sqrt(p), v>; see `robustkern.ops.random_cotangents`.

    Differentiable in any order: sqrt(p) = exp(log_softmax / 2) has no infinite slope where p vanishes.

    >>> rk.reference.random_cotangents(torch.zeros(2, 4), 3).shape
    torch.Size([3, 2, 4])
    """
    if seed is None:
        seed = draw_seed(outputs, generator)
    dtype = accumulation_dtype(outputs.dtype)
    batch, classes = outputs.shape[:2]
    with torch.no_grad():
        v = _draws(seed, projections, batch, math.prod(outputs.shape[1:]), law, dtype)
        v = v.reshape(projections, batch, classes, math.prod(outputs.shape[2:]))
    if kind == "plain":
        w = v
    elif kind == "centred":
        w = v - v.mean(2, keepdim=True)
    else:
        log_p = torch.log_softmax(outputs.to(dtype).reshape(v.shape[1:]), 1)
        scaled = torch.exp(0.5 * log_p) * v
        w = scaled - log_p.exp() * scaled.sum(2, keepdim=True)
    return w.to(outputs.dtype).reshape(projections, *outputs.shape)


def draw_seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:  # [1] int64
    """A new seed on the device of `like`, from `generator` or the default one there, without waiting for the device."""
    return torch.randint(2**63 - 1, (1,), generator=generator, device=like.device)
