"""The CUDA backends of scaled_dot_product_attention for CPU tensors, in float64.

Each keeps for its backward what its own kernels keep: the efficient one a logsumexp of as many rows as fill its blocks,
cuDNN's a logsumexp of one column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_OF_A_BLOCK = 32  # of the efficient backend
aten = torch.ops.aten


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, bias, causal, scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, bias: Tensor | None, causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = (_scores(q, k, bias, causal, scale) - logsumexp[..., None]).exp()
    slope = p * (g @ v.mT - (g * out).sum(-1, keepdim=True))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return factor * slope @ k, factor * slope.mT @ q, p.mT @ g, slope


def _flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    out, logsumexp = _forward(q, k, v, None, causal, scale)
    none = q.new_empty(0)
    return out, logsumexp, none, none, q.shape[2], k.shape[2], none, none, none


def _flash_backward(  # type: ignore[no-untyped-def]
    g, q, k, v, out, logsumexp, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale=None
):
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    return _backward(g, q, k, v, out, logsumexp, None, causal, scale)[:3]


def _efficient(q, k, v, bias, keep, dropout=0.0, causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    out, logsumexp = _forward(q, k, v, bias, causal, scale)
    none = q.new_empty(0)
    return out, F.pad(logsumexp, (0, -q.shape[2] % ROWS_OF_A_BLOCK), value=torch.nan), none, none


def _efficient_backward(  # type: ignore[no-untyped-def]
    g, q, k, v, bias, out, logsumexp, seed, offset, dropout, mask, causal=False, *, scale=None
):
    assert logsumexp.shape[2] % ROWS_OF_A_BLOCK == 0
    grads = _backward(g, q, k, v, out, logsumexp[:, :, : q.shape[2]], bias, causal, scale)
    return tuple(t if wanted else None for t, wanted in zip(grads, mask, strict=True))


def _cudnn(q, k, v, bias, keep, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    out, logsumexp = _forward(q, k, v, bias, causal, scale)
    none = q.new_empty(0)
    return out, logsumexp[..., None], none, none, q.shape[2], k.shape[2], none, none, none


def _cudnn_backward(  # type: ignore[no-untyped-def]
    g, q, k, v, out, logsumexp, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale=None
):
    return _backward(g, q, k, v, out, logsumexp.squeeze(3), bias, causal, scale)[:3]


KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
CALLS: dict[str, Callable[..., Tensor]] = {
    "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0],
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[0],
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0],
}


@contextmanager
def on_cpu_tensors() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "CPU")
    try:
        yield
    finally:
        library._destroy()
