"""Scaled dot-product attention in plain PyTorch: its second derivative, and its derivative in forward mode."""

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype


def attention_double_backward(
    a: Tensor | None,  # [B, H, L, D]
    b: Tensor | None,  # [B, G, S, D]
    c: Tensor | None,  # [B, G, S, E]
    grad: Tensor,  # [B, H, L, E]
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, E]
    out: Tensor | None,  # [B, H, L, E], like logsumexp [B, H, L]: what a kernel need not compute again
    logsumexp: Tensor | None,
    mask: Tensor | None,  # added to the scores; broadcastable to [B, H, L, S]
    causal: bool,
    scale: float,
    need_grad: bool = True,
    need_q: bool = True,
    need_k: bool = True,
    need_v: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of L = <a, grad_q> + <b, grad_k> + <c, grad_v>, of attention's first derivatives, in grad, q, k and v.

    ::

        S = scale q k^T + mask      P = softmax(S)      dP = grad v^T      D = sum_j P dP      dS = P (dP - D)
        T = scale (a k^T + q b^T)                 t = sum_j P T      Pd = P (T - t)
        G = (dP - D) (T - t) + grad c^T           g = sum_j P G      W = P (G - g)

        gg_grad = Pd v + P c                         grad_q = scale (W k + dS b)
        grad_v = Pd^T grad                           grad_k = scale (W^T q + dS^T a)

    A row whose keys are all masked attends to nothing: its probabilities are zero.  The scores of all heads are stored.
    Here out and logsumexp, which are functions of q, k and v, are computed again.

    Returns:
        (gg_grad, grad_q, grad_k, grad_v), each shaped like its tensor, or [0] where it is not needed.

    >>> q, k, v, grad, a = torch.rand(5, 1, 2, 3, 4)
    >>> results = rk.reference.attention_double_backward(
    ...     a, None, None, grad, q, k, v, None, None, None, causal=False, scale=0.5
    ... )
    >>> [result.shape for result in results] == 4 * [q.shape]
    True
    """
    group = q.shape[1] // max(k.shape[1], 1)

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2) if group > 1 else x

    a = torch.zeros_like(q) if a is None else a
    b = _per_head(torch.zeros_like(k) if b is None else b, group)
    c = _per_head(torch.zeros_like(v) if c is None else c, group)
    keys, values = _per_head(k, group), _per_head(v, group)

    p = _probabilities(_scores(q, keys, mask, causal, scale))
    slope = grad @ values.mT
    slope = slope - (p * slope).sum(-1, keepdim=True)
    tangent = scale * (a @ keys.mT + q @ b.mT)
    tangent = tangent - (p * tangent).sum(-1, keepdim=True)
    bend = slope * tangent + grad @ c.mT
    w = p * (bend - (p * bend).sum(-1, keepdim=True))
    moved = p * tangent
    slope = p * slope
    nothing = q.new_empty([0])
    return (
        moved @ values + p @ c if need_grad else nothing,
        scale * (w @ keys + slope @ b) if need_q else nothing,
        per_key_head(scale * (w.mT @ q + slope.mT @ a)) if need_k else nothing,
        per_key_head(moved.mT @ grad) if need_v else nothing,
    )


def attention_jvp(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, E]
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    mask: Tensor | None = None,  # added to the scores; broadcastable to [B, H, L, S]
    mask_tangent: Tensor | None = None,  # broadcastable to [B, H, L, S], too
    causal: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out = softmax(scale q k^T + mask) v, and how it moves when q, k, v and the mask move along their tangents.

    ::

        S = scale q k^T + mask      P = softmax(S)     T = scale (dq k^T + q dk^T) + dmask   t = sum_j P T
        out = P v                   tangent = (P (T - t)) v + P dv                           logsumexp = log sum_j exp S

    An absent tangent is zero.  A row whose keys are all masked attends to nothing: its output is zero, whatever moves.
    The scores of all heads are stored.

    Returns:
        (out, tangent, logsumexp): [B, H, L, E] twice, and [B, H, L] in the accumulation type, which has no derivative.

    >>> q, k, v = torch.rand(3, 1, 2, 5, 4)
    >>> out, tangent, _ = rk.reference.attention_jvp(q, k, v, None, None, torch.ones_like(v), scale=0.5)
    >>> torch.allclose(tangent, torch.ones_like(v))  # weights add up to 1
    True
    """
    group = q.shape[1] // max(k.shape[1], 1)
    keys, values = _per_head(k, group), _per_head(v, group)
    scores = _scores(q, keys, mask, causal, scale)
    p = _probabilities(scores)
    moved = torch.zeros_like(scores)
    if q_tangent is not None:
        moved = moved + scale * (q_tangent @ keys.mT)
    if k_tangent is not None:
        moved = moved + scale * (q @ _per_head(k_tangent, group).mT)
    if mask_tangent is not None:
        moved = moved + mask_tangent.to(moved.dtype)
    tangent = (p * (moved - (p * moved).sum(-1, keepdim=True))) @ values
    if v_tangent is not None:
        tangent = tangent + p @ _per_head(v_tangent, group)
    return p @ values, tangent, scores.detach().to(accumulation_dtype(q.dtype)).logsumexp(-1)


def _per_head(x: Tensor, group: int) -> Tensor:
    """A head of k or v for every head of q."""
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def _scores(q: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = scale * (q @ keys.mT)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _probabilities(scores: Tensor) -> Tensor:
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)
