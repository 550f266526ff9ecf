"""The second derivative of scaled dot-product attention in plain PyTorch."""

import torch
from torch import Tensor


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
    """
    group = q.shape[1] // max(k.shape[1], 1)

    def per_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=1) if group > 1 else x

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2) if group > 1 else x

    a = torch.zeros_like(q) if a is None else a
    b = per_head(torch.zeros_like(k) if b is None else b)
    c = per_head(torch.zeros_like(v) if c is None else c)
    keys, values = per_head(k), per_head(v)

    scores = scale * (q @ keys.mT)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    p = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
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
