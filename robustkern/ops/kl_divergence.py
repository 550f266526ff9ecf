"""kl_divergence: how far apart two predictions of each sample are, with both gradients and second derivatives."""

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import Impl
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._chains import register_chain
from robustkern.ops._register import register_fake, register_row_vmap
from robustkern.ops._select import check_floating, use_kernel


def kl_divergence(
    p_logits: Tensor,  # [B, C] or [B, C, d1, ...]
    q_logits: Tensor,  # like p_logits
    *,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # [B] or [B, d1, ...]
    r"""kl_i = sum_c p_ic (log p_ic - log q_ic), with p = softmax(p_logits / T) and q = softmax(q_logits / T).

    Both logits are differentiated; detach the one that is a target.  A class with p = 0 (a logit of -inf, or too far
    below the others) adds nothing to the value or to any derivative, whatever q is; one with q = 0 and p > 0 makes
    the divergence infinite.  The kernel sums terms that are never negative: two predictions that nearly agree keep the
    digits in which they differ, and equal ones give exactly 0.  Sums run in float32 for 16- and 32-bit logits and in
    float64 for float64.

    Args:
        p_logits: [B, C] or [B, C, d1, ...] float32, float64, float16 or bfloat16; B may be 0.
        q_logits: of the same shape, dtype and device.
        temperature: T > 0; gradients include the factor 1 / T.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        [B] (or [B, d1, ...]), float32 for 16- and 32-bit logits, float64 for float64.

    Raises:
        TypeError: logits of an unsupported dtype, or of two different ones.
        ValueError: shapes or devices differ, or T is not positive.

    Differentiability: twice in both logits; a third derivative raises.  Determinism: the same bits on every run and
    for every batch size.  Saved for backward: both logits and five numbers a row (each one's maximum and the log of its
    sum, and log p - log q of p's first choice).

    >>> p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 2.0]])
    >>> rk.ops.kl_divergence(p, q).tolist()  # equal distributions
    [0.0]
    """
    op = "kl_divergence"
    check_floating(op, "p_logits", p_logits)
    check_floating(op, "q_logits", q_logits)
    if p_logits.dim() < 2:
        raise ValueError(f"{op}: p_logits must be [B, C] or [B, C, ...], got shape {list(p_logits.shape)}")
    if q_logits.dtype != p_logits.dtype:
        raise TypeError(f"{op}: q_logits must be {p_logits.dtype} like p_logits, got {q_logits.dtype}")
    if q_logits.shape != p_logits.shape or q_logits.device != p_logits.device:
        raise ValueError(
            f"{op}: q_logits must be {list(p_logits.shape)} on {p_logits.device} like p_logits, got "
            f"{list(q_logits.shape)} on {q_logits.device}"
        )
    if not temperature > 0.0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    if not use_kernel(op, impl, p_logits):
        return reference.kl_divergence(p_logits, q_logits, temperature=temperature)
    shape = [p_logits.shape[0], *p_logits.shape[2:]]
    if p_logits.dim() > 2:
        p_logits, q_logits = (z.movedim(1, -1).reshape(-1, z.shape[1]) for z in (p_logits, q_logits))
    value, _ = torch.ops.robustkern.kl_divergence(p_logits, q_logits, float(temperature))
    return value.reshape(shape)


def _register() -> None:
    ops = torch.ops.robustkern

    @register_fake("kl_divergence")
    def _(p_logits, q_logits, temperature):  # type: ignore[no-untyped-def]
        rows, dtype = p_logits.shape[0], accumulation_dtype(p_logits.dtype)
        return p_logits.new_empty([rows], dtype=dtype), p_logits.new_empty([rows, 6], dtype=dtype)

    @register_fake("kl_divergence_backward")
    def _(grad, p_logits, q_logits, statistics, temperature, need_p, need_q):  # type: ignore[no-untyped-def]
        return tuple(p_logits.new_empty(p_logits.shape if need else [0]) for need in (need_p, need_q))

    @register_fake("kl_divergence_double_backward")
    def _(u, v, grad, p_logits, q_logits, statistics, temperature, need_p, need_q):  # type: ignore[no-untyped-def]
        per_row = p_logits.new_empty([p_logits.shape[0]], dtype=accumulation_dtype(p_logits.dtype))
        return per_row, *(p_logits.new_empty(p_logits.shape if need else [0]) for need in (need_p, need_q))

    # The statistics are functions of the logits, and their derivatives in those of the logits.
    register_chain("kl_divergence")

    register_row_vmap(ops.kl_divergence, (True, True, False))
    register_row_vmap(ops.kl_divergence_backward, (True, True, True, True, False, False, False))
    register_row_vmap(ops.kl_divergence_double_backward, (True, True, True, True, True, True, False, False, False))


if _library.extension() is not None:
    _register()
