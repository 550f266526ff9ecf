"""Sample calls of the derivatives of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype
from tests.samples import DerivativeSample, make_tensor


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What a forward saves: its result and the logarithm of the sum of every row's exponentials."""
    group = q.shape[1] // max(k.shape[1], 1)
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = scale * (q.double() @ keys.mT)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    out = (scores.softmax(-1) @ values).to(q.dtype)
    return out, scores.logsumexp(-1).to(accumulation_dtype(q.dtype))


def double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    make = make_tensor(device, dtype)

    def sample(
        name: str,
        batch: int = 2,
        heads: int = 3,
        queries: int = 5,
        keys: int = 7,
        key_size: int = 4,
        value_size: int = 6,
        *,
        key_heads: int | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float = 0.25,
        given: str = "qkv",
        need: str = "gqkv",
        layout: str = "heads outside",
        recomputed: bool = False,
        zero: tuple[int, ...] = (),
    ) -> DerivativeSample:
        def tensor(count: int, length: int, size: int) -> Tensor:
            if layout == "heads inside":  # as a projection leaves them
                return make(batch, length, count, size).transpose(1, 2)
            if layout == "sizes outside":
                return make(batch, count, size, length).transpose(2, 3)
            return make(batch, count, length, size)

        key_heads = heads if key_heads is None else key_heads
        like_q, like_k, like_v = (heads, queries, key_size), (key_heads, keys, key_size), (key_heads, keys, value_size)
        q, k, v = tensor(*like_q), tensor(*like_k), tensor(*like_v)
        # A mask may hide a whole row, whose logarithm no backend agrees on.
        saved = mask is None and not recomputed and keys > 0
        out, logsumexp = forward(q, k, v, causal, scale) if saved else (None, None)
        return DerivativeSample(
            name,
            {
                "a": tensor(*like_q) if "q" in given else None,
                "b": tensor(*like_k) if "k" in given else None,
                "c": tensor(*like_v) if "v" in given else None,
                "grad": tensor(heads, queries, value_size),
                "q": q,
                "k": k,
                "v": v,
                "out": out,
                "logsumexp": logsumexp,
                "mask": mask,
                "causal": causal,
                "scale": scale,
                "need_grad": "g" in need,
                "need_q": "q" in need,
                "need_k": "k" in need,
                "need_v": "v" in need,
            },
            zero,
        )

    never = torch.full((), -torch.inf, dtype=dtype, device=device)
    padding = torch.where(
        torch.arange(7, device=device) < torch.tensor([[4], [6]], device=device), 0 * never.exp(), never
    )
    one_row_masked = torch.where(torch.arange(5, device=device)[:, None] == 2, never, make(5, 7))

    yield sample("everything")
    yield sample("nothing saved", recomputed=True)
    yield sample("heads inside", layout="heads inside")
    yield sample("sizes outside", layout="sizes outside")
    yield sample("causal", causal=True)
    yield sample("causal, nothing saved", causal=True, recomputed=True)
    yield sample("causal, more queries than keys", queries=9, keys=4, causal=True)
    yield sample("mask of scores", mask=make(5, 7))
    yield sample("mask of heads", mask=make(1, 3, 5, 7))
    yield sample("mask of padding", mask=padding[:, None, None, :])
    yield sample("mask of a row", mask=one_row_masked)
    yield sample("mask of queries", mask=make(2, 3, 5, 1))
    yield sample("mask and causal", mask=make(2, 1, 5, 7), causal=True)
    yield sample("fewer heads of keys", heads=4, key_heads=2)
    yield sample("fewer heads of keys, causal", heads=4, key_heads=2, causal=True)
    yield sample("fewer heads of keys, causal, mask", heads=4, key_heads=1, mask=make(2, 4, 5, 7), causal=True)
    yield sample("cotangent of grad_q", given="q")
    yield sample("cotangent of grad_k", given="k")
    yield sample("cotangent of grad_k, nothing saved", given="k", recomputed=True)
    yield sample("cotangent of grad_v", given="v", zero=(3,))
    yield sample("cotangents of grad_q and grad_v", given="qv")
    yield sample("gradient of grad", need="g")
    yield sample("gradient of q", need="q")
    yield sample("gradient of k", need="k")
    yield sample("gradient of v", need="v")
    yield sample("gradient of grad from grad_v", given="v", need="g")
    yield sample("several blocks of rows", 1, 2, 90, 400, 8, 8)
    yield sample("several blocks of rows, nothing saved", 1, 2, 90, 400, 8, 8, recomputed=True)
    yield sample("several blocks of rows, causal", 1, 2, 90, 400, 8, 8, causal=True, need="qk")
    yield sample("keys in several parts", 1, 1, 3, 1100, 4, 4)
    yield sample("keys in several parts, cotangents of grad_q and grad_v", 1, 1, 3, 1100, 4, 4, given="qv")
    yield sample("many heads", 4, 5, 17, 17, 8, 8)
    yield sample("large scores", scale=4.0)
    yield sample("large scores, nothing saved", scale=4.0, recomputed=True)
    yield sample("one key", keys=1, recomputed=True, zero=(1, 2, 3))  # exactly, as P is one
    yield sample("empty batch", batch=0)
    yield sample("no queries", queries=0, zero=(2, 3))
    yield sample("no keys", keys=0, zero=(0, 1))


def jvp_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    make = make_tensor(device, dtype)

    def sample(
        name: str,
        batch: int = 2,
        heads: int = 3,
        queries: int = 5,
        keys: int = 7,
        key_size: int = 4,
        value_size: int = 6,
        *,
        key_heads: int | None = None,
        mask: Tensor | None = None,
        mask_tangent: Tensor | None = None,
        causal: bool = False,
        scale: float = 0.25,
        moving: str = "qkv",
        layout: str = "heads outside",
        zero: tuple[int, ...] = (),
    ) -> DerivativeSample:
        def tensor(count: int, length: int, size: int) -> Tensor:
            if layout == "heads inside":  # as a projection leaves them
                return make(batch, length, count, size).transpose(1, 2)
            if layout == "sizes outside":
                return make(batch, count, size, length).transpose(2, 3)
            return make(batch, count, length, size)

        key_heads = heads if key_heads is None else key_heads
        like_q, like_k, like_v = (heads, queries, key_size), (key_heads, keys, key_size), (key_heads, keys, value_size)
        return DerivativeSample(
            name,
            {
                "q": tensor(*like_q),
                "k": tensor(*like_k),
                "v": tensor(*like_v),
                "q_tangent": tensor(*like_q) if "q" in moving else None,
                "k_tangent": tensor(*like_k) if "k" in moving else None,
                "v_tangent": tensor(*like_v) if "v" in moving else None,
                "mask": mask,
                "mask_tangent": mask_tangent,
                "causal": causal,
                "scale": scale,
            },
            zero,
        )

    never = torch.full((), -torch.inf, dtype=dtype, device=device)
    padding = torch.where(torch.arange(7, device=device) < torch.tensor([[4], [6]], device=device), make(2, 7), never)

    yield sample("everything")
    yield sample("heads inside", layout="heads inside")
    yield sample("sizes outside", layout="sizes outside")
    yield sample("causal", causal=True)
    yield sample("causal, more queries than keys", queries=9, keys=4, causal=True)
    yield sample("mask of scores", mask=make(5, 7))
    yield sample("mask of heads that moves", mask=make(1, 3, 5, 7), mask_tangent=make(1, 3, 5, 7))
    yield sample("mask of padding", mask=padding[:, None, None, :])
    yield sample("mask of queries", mask=make(2, 3, 5, 1))
    yield sample("mask and causal", mask=make(2, 1, 5, 7), causal=True)
    yield sample("fewer heads of keys", heads=4, key_heads=2)
    yield sample("fewer heads of keys, causal, mask", heads=4, key_heads=1, mask=make(2, 4, 5, 7), causal=True)
    yield sample("q moves", moving="q")
    yield sample("k moves", moving="k")
    yield sample("v moves", moving="v")
    yield sample("mask moves", moving="", mask=make(5, 7), mask_tangent=make(5, 7))
    yield sample("nothing moves", moving="", zero=(1,))
    yield sample("several blocks of rows", 1, 2, 90, 400, 8, 8)
    yield sample("several blocks of rows, causal", 1, 2, 90, 400, 8, 8, causal=True)
    yield sample("many heads", 4, 5, 17, 17, 8, 8)
    yield sample("large scores", scale=4.0)
    yield sample("one key", keys=1)
    yield sample("empty batch", batch=0)
    yield sample("no queries", queries=0)
