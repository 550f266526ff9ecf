"""The second derivative of attention, as `robustkern.install()` puts it into PyTorch, and its forward mode."""

from typing import Any

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import Impl
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._pytorch_derivatives import DERIVATIVES, Derivative, nothing, register_derivative
from robustkern.ops._register import register_fake
from robustkern.ops._select import check_floating, use_kernel


def attention_jvp(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, E]
    q_tangent: Tensor | None = None,
    k_tangent: Tensor | None = None,
    v_tangent: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mask_tangent: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # [B, H, L, E] twice
    r"""out = P v with P = softmax(scale q k^T + mask), and tangent = P * (T - sum_j P T) v + P dv.

    T = scale (dq k^T + q dk^T) + dmask is how the scores move when q, k, v and mask move along their tangents dq, dk,
    dv and dmask; the tangent is how the output moves.  Value and tangent come in one pass: six matrix products, where
    attention alone takes two, and memory linear in the sequence.  Sums run in float32 for 16- and 32-bit data and in
    float64 for float64.  Under `robustkern.install()`, forward mode over scaled_dot_product_attention runs this.

    Args:
        q: queries, [B, H, L, D] float32, float64, float16 or bfloat16, of any layout.
        k: keys, [B, G, S, D]; G divides H, and head h of q attends to head h // (H // G).
        v: values, [B, G, S, E].
        q_tangent: dq, like q.  None: q does not move.
        k_tangent: dk, like k, or None.
        v_tangent: dv, like v, or None.
        mask: added to the scores, floating-point and broadcastable to [B, H, L, S]; or boolean, False where a query
            must not attend.  A row whose keys are all hidden is zero, and so is its tangent.
        mask_tangent: dmask, shaped like a floating-point mask, or None.
        causal: row i attends to the keys 0 to i.
        scale: of the scores; None: 1 / sqrt(D).
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        (out, tangent) in the dtype of q, with the heads next to the columns in memory.

    Raises:
        TypeError: q is not a floating-point tensor.
        ValueError: q is not of four dimensions, or mask_tangent without a floating-point mask.
        RuntimeError: other shapes, dtypes or devices that do not fit.

    Differentiability: any order, in q, k, v, mask and the tangents.  First gradients of both results take memory linear
    in the sequence: they are PyTorch's first backward and `attention_double_backward`.  Gradients in a mask, and higher
    orders, store the scores of all heads.  Determinism: the same bits on every run, for every batch size and number of
    threads; its gradients are as deterministic as PyTorch's.  Saved for backward: q, k, v, mask, the tangents, out and
    one number for each row.

    >>> q, k, v = torch.rand(3, 1, 2, 5, 4)
    >>> out, tangent = rk.ops.attention_jvp(q, k, v, v_tangent=torch.ones_like(v))
    >>> torch.allclose(tangent, torch.ones_like(v))  # weights add up to 1
    True
    """
    check_floating("attention_jvp", "q", q)
    if q.dim() != 4:
        raise ValueError(f"attention_jvp: q must be [B, H, L, D], got shape {list(q.shape)}")
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    if mask is not None and mask.dtype == torch.bool:
        if mask_tangent is not None:
            raise ValueError("attention_jvp: mask_tangent needs a floating-point mask, got a boolean one")
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if mask_tangent is not None and mask is None:
        raise ValueError("attention_jvp: mask_tangent needs a mask")
    arguments = (q, k, v, q_tangent, k_tangent, v_tangent, mask, mask_tangent, causal, scale)
    if use_kernel("attention_jvp", impl, q, _library.aten_why_unavailable()):
        out, tangent, _ = torch.ops.robustkern.attention_jvp(*arguments)
    else:
        out, tangent, _ = reference.attention_jvp(*arguments)
    return out, tangent


def _like(tensor: Tensor, needed: bool) -> Tensor:
    result = torch.empty_like(tensor) if needed else nothing(tensor)
    return result if not needed or tensor.shape[3] <= 1 or result.stride(3) == 1 else tensor.new_empty(tensor.shape)


@register_derivative(reference.attention_double_backward)
def _(a, b, c, grad, q, k, v, out, logsumexp, mask, causal, scale,  # type: ignore[no-untyped-def]
      need_grad, need_q, need_k, need_v):  # fmt: skip
    return _like(grad, need_grad), _like(q, need_q), _like(k, need_k), _like(v, need_v)


DERIVATIVES["attention_jvp"] = Derivative(
    reference.attention_jvp, results=("out", "tangent", "logsumexp"), ends_chain=False
)


def _register() -> None:
    @register_fake("attention_jvp")
    def _(q, k, v, q_tangent, k_tangent, v_tangent, mask, mask_tangent, causal, scale):  # type: ignore[no-untyped-def]
        batch, heads, queries, _ = q.shape

        def result() -> Tensor:
            return q.new_empty([batch, queries, heads, v.shape[3]]).transpose(1, 2)

        return result(), result(), q.new_empty([batch, heads, queries], dtype=accumulation_dtype(q.dtype))

    torch.library.register_vmap(torch.ops.robustkern.attention_jvp.default, _vmap)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """vmap(op)(x)[k] = op(x[k]), as one call: what is mapped over is folded into the batch."""
    count = info.batch_size
    batch = args[0].shape[1 if in_dims[0] == 0 else 0]

    def stack(value: Tensor, dim: int | None) -> Tensor:
        return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)

    def fold(value: Tensor | None, dim: int | None) -> Tensor | None:
        return None if value is None else stack(value, dim).flatten(0, 1)

    def fold_mask(value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None:
            return None
        stacked = stack(value, dim)
        stacked = stacked.reshape(count, *(1,) * (5 - stacked.dim()), *stacked.shape[1:])
        return stacked.expand(-1, batch, -1, -1, -1).flatten(0, 1)

    tensors = [fold(value, dim) for value, dim in zip(args[:6], in_dims)]
    masks, mask_dims = args[6:8], in_dims[6:8]
    if mask_dims != (None, None) or any(m is not None and m.dim() == 4 and m.shape[0] > 1 for m in masks):
        masks = tuple(fold_mask(value, dim) for value, dim in zip(masks, mask_dims))
    results = torch.ops.robustkern.attention_jvp(*tensors, *masks, *args[8:])
    return tuple(t.reshape(count, batch, *t.shape[1:]) for t in results), (0, 0, 0)


if _library.extension() is not None:
    _register()
