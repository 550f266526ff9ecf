"""kl_divergence in plain PyTorch."""

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype


def kl_divergence(
    p_logits: Tensor,  # [B, C] or [B, C, d1, ...]
    q_logits: Tensor,  # like p_logits
    *,
    temperature: float = 1.0,
) -> Tensor:  # [B] or [B, d1, ...]
    """kl_i = sum_c p_ic (log p_ic - log q_ic); see `robustkern.ops.kl_divergence`.

    >>> rk.reference.kl_divergence(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
    [0.0]
    """
    dtype = accumulation_dtype(p_logits.dtype)
    log_p, log_q = ((z.to(dtype) / temperature).log_softmax(1) for z in (p_logits, q_logits))
    p = log_p.exp()
    # Selected before the product: 0 times infinity would be NaN, in the value and in every derivative.
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(1)
