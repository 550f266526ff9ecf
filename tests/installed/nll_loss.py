"""Classification losses of PyTorch: log_softmax followed by nll_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.installed import Case
from tests.installed.activation import inputs

ROWS, IMAGES = (4, 5), (1, 5, 2, 2)


def loss(function: Callable[..., Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    """`function` of logits and labels; one label is ignored if `ignore_index` is given."""

    def apply(x: Tensor) -> Tensor:
        labels = torch.arange(x.numel() // 5, device=x.device).remainder(5)
        labels = labels.reshape(x.shape[0], *x.shape[2:]) if x.dim() > 1 else labels[0]
        known = {k: v.to(x) if isinstance(v, Tensor) else v for k, v in options.items()}
        return function(x, labels, **known)

    return apply


def squared_nll(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Nonlinear, unlike nll_loss itself."""
    return F.nll_loss(x.square(), labels, **options).square()


def soft_targets(x: Tensor) -> Tensor:
    """Cross-entropy with the probabilities 1/15, ..., 5/15."""
    return F.cross_entropy(x, (torch.arange(1, 6, device=x.device).to(x) / 15).expand_as(x))


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "weight": {"weight": WEIGHT},
    "weight, none": {"weight": WEIGHT, "reduction": "none"},
    "ignore_index": {"ignore_index": 1},
    "weight and ignore_index": {"weight": WEIGHT, "ignore_index": 1},
}
SMOOTHED = {"smoothing": {"label_smoothing": 0.1}, "smoothing and weight": {"label_smoothing": 0.1, "weight": WEIGHT}}
CASES = [
    *(
        Case(f"cross_entropy{kind}, {name}", loss(F.cross_entropy, **options), inputs(*shape))
        for name, options in {**OPTIONS, **SMOOTHED}.items()
        for kind, shape in (("", ROWS), (" of images", IMAGES))
    ),
    *(
        Case(f"nll_loss{kind}, {name}", loss(squared_nll, **options), inputs(*shape))
        for name, options in OPTIONS.items()
        for kind, shape in (("", ROWS), (" of images", IMAGES))
    ),
    Case("cross_entropy of one row", loss(F.cross_entropy), inputs(5)),
    Case("cross_entropy, soft targets", soft_targets, inputs(4, 5)),
]
