"""margin_loss in plain PyTorch."""

import torch
from torch import Tensor

from robustkern._choices import Margin
from robustkern._dtypes import accumulation_dtype


def margin_loss(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B]
    *,
    kind: Margin = "cw",
    towards: Tensor | None = None,  # [B]
) -> Tensor:  # [B]
    """loss_i = (max_{k != y} z_k - z_y) / scale(z); see `robustkern.ops.margin_loss`.

    >>> rk.reference.margin_loss(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])).tolist()
    [-1.0]
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    own = z.gather(1, target[:, None]).squeeze(1)
    if towards is None:
        other = torch.where(order[:, 0] == target, ordered[:, 1], ordered[:, 0])
    else:
        other = z.gather(1, towards[:, None]).squeeze(1)
    if kind == "cw":
        return other - own
    scale = ordered[:, 0] - (ordered[:, 2] if towards is None else 0.5 * (ordered[:, 2] + ordered[:, 3]))
    flat = scale == 0
    return torch.where(flat, 0.0, (other - own) / torch.where(flat, 1.0, scale))
