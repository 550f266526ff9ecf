"""softmax_cross_entropy in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from robustkern._dtypes import accumulation_dtype


def softmax_cross_entropy(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B] classes or [B, C] probabilities
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> Tensor:  # [B]
    """loss_i = -sum_c q_ic log softmax(z_i / T)_c; see `robustkern.ops.softmax_cross_entropy`.

    >>> rk.reference.softmax_cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp().round(decimals=3).tolist()
    [4.0]
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    if temperature != 1.0:
        z = z / temperature
    if target.is_floating_point():
        target = target.to(z.dtype)
    return F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index)
