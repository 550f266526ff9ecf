"""row_norm in plain PyTorch."""

import math

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype


def row_norm(
    x: Tensor,  # [B, ...]
    p: float = 2.0,
    weight: Tensor | None = None,  # [C]
    *,
    squared: bool = False,
) -> Tensor:  # [B]
    """n_i = ||w * x_i||_p; see `robustkern.ops.row_norm`.

    Differentiable in any order, with zero subgradients at zero: square roots and powers are taken only where their
    argument is not zero, so that no derivative meets 0 * inf.

    >>> rk.reference.row_norm(torch.tensor([[3.0, -4.0]])).tolist()
    [5.0]
    """
    a = x.to(accumulation_dtype(x.dtype))
    if weight is not None:
        a = a * weight.to(a.dtype).reshape(-1, *(1 for _ in range(x.dim() - 2)))
    a = a.reshape(x.shape[0], math.prod(x.shape[1:]))
    if a.shape[1] == 0:
        return a.sum(1)
    if squared:
        return (a * a).sum(1)
    if p == 1.0:
        return a.abs().sum(1)
    if math.isinf(p):
        return a.abs().amax(1)
    # n does not depend on the scale, so the scale is not differentiated.
    scale = a.detach().abs().amax(1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    r = a / scale
    nonzero = r != 0
    safe = torch.where(nonzero, r, torch.ones_like(r))
    powers = safe * safe if p == 2.0 else safe.abs().pow(p)
    total = torch.where(nonzero, powers, torch.zeros_like(r)).sum(1)
    positive = total != 0
    root = torch.where(positive, total, torch.ones_like(total))
    root = root.sqrt() if p == 2.0 else root.pow(1.0 / p)
    return scale.squeeze(1) * torch.where(positive, root, torch.zeros_like(root))
