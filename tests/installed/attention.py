"""scaled_dot_product_attention in every form that PyTorch sends to a fused backend, and the modules that use it.

PyTorch differentiates it twice on its MATH backend alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.installed import Case


def math_backend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def stock(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*inputs)

    return stock


def case(
    name: str, function: Callable[..., Tensor], inputs: Callable[[torch.dtype], tuple[Tensor, ...]], **options: Any
) -> Case:
    return Case(name, function, inputs, stock=math_backend(function), **options)


def tensors(*shapes: tuple[int, ...], inside: bool = False) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) if inside else t for t in made)

    return inputs


def attention(
    name: str,
    heads: int = 2,
    key_heads: int = 2,
    queries: int = 4,
    keys: int = 4,
    mask: Callable[[Tensor], Tensor] | None = None,
    inside: bool = False,
    **options: Any,
) -> Case:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask(q), **options)

    shapes = (2, heads, queries, 3), (2, key_heads, keys, 3), (2, key_heads, keys, 3)
    return case(name, function, tensors(*shapes, inside=inside))


def visible(*shape: int) -> Callable[[Tensor], Tensor]:
    """A boolean mask that hides some keys, but never a query's first one."""

    def mask(q: Tensor) -> Tensor:
        rows = torch.arange(torch.Size(shape).numel(), device=q.device).view(shape)
        return rows % 3 != 1

    return mask


def row_hidden(q: Tensor) -> Tensor:
    return (torch.arange(4, device=q.device) != 1)[:, None].expand(4, 4)


def without_the_hidden_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `row_hidden` comes to: the query attends to nothing."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v) * row_hidden(q)[:, :1]


def added(*shape: int) -> Callable[[Tensor], Tensor]:
    def mask(q: Tensor) -> Tensor:
        return torch.arange(torch.Size(shape).numel(), device=q.device).view(shape).sin().to(q.dtype)

    return mask


def self_attention(x: Tensor) -> Tensor:
    """Attention where q, k and v are one tensor."""
    return F.scaled_dot_product_attention(x, x, x)


def packed(qkv: Tensor) -> Tensor:
    """Attention on the slices of one projection, [B, L, 3, H, D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


def multihead(causal: bool) -> Callable[..., Tensor]:
    def function(x: Tensor, in_weight: Tensor, out_weight: Tensor) -> Tensor:
        bias = torch.linspace(-1, 1, 12, dtype=x.dtype, device=x.device)
        mask = nn.Transformer.generate_square_subsequent_mask(3, x.device, x.dtype) if causal else None
        return F.multi_head_attention_forward(
            x, x, x, 4, 2, in_weight, bias, None, None, False, 0.0, out_weight, bias[:4],
            need_weights=False, attn_mask=mask, is_causal=causal,
        )[0]  # fmt: skip

    return function


CASES = [
    attention("plain"),
    attention("heads inside", inside=True),
    attention("causal", is_causal=True),
    attention("other keys", keys=5),
    attention("causal, more keys", keys=5, is_causal=True),
    attention("causal, more queries", queries=5, is_causal=True),
    attention("scale", scale=0.3),
    attention("boolean mask", mask=visible(4, 4)),
    attention("boolean mask of padding", mask=visible(2, 1, 1, 4)),
    attention("row without keys", mask=row_hidden),
    attention("added mask", mask=added(4, 4)),
    attention("added mask of heads", mask=added(1, 2, 4, 4)),
    attention("grouped queries", heads=4, enable_gqa=True),
    attention("grouped queries, causal", heads=4, is_causal=True, enable_gqa=True),
    case("self", self_attention, tensors((2, 2, 4, 3))),
    case("packed", packed, tensors((2, 4, 3, 2, 3))),
    case("multihead", multihead(causal=False), tensors((3, 2, 4), (12, 4), (4, 4))),
    case("multihead, causal", multihead(causal=True), tensors((3, 2, 4), (12, 4), (4, 4))),
]
