"""Sample calls of margin_loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern.ops.margin_loss import KINDS, margin_loss
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, op = make_tensor(device, dtype), margin_loss
    target = torch.tensor([3, 0, 9, 3, 5], device=device)
    other = torch.tensor([1, 2, 3, 4, 6], device=device)

    def sample(name: str, logits: Tensor, classes: Tensor = target, **options: Any) -> Sample:
        return Sample(op, (logits, classes), options, name, not logits.numel(), ("gg_grad", "second"), orders=1)

    for kind in KINDS:
        yield sample(kind, 3 * make(5, 10), kind=kind)
        yield sample(f"{kind}, towards", 3 * make(5, 10), kind=kind, towards=other)
        yield sample(f"{kind}, 3000 classes", 3 * make(5, 3000), target * 300, kind=kind)
        yield sample(f"{kind}, huge logits", 3 * make(5, 10) + 1000, kind=kind)
        yield sample(f"{kind}, strided columns", make(5, 20)[:, ::2], kind=kind)
        yield sample(f"{kind}, transposed", make(10, 5).t(), kind=kind, towards=other)
        yield sample(f"{kind}, few classes", make(5, 4), target % 4, kind=kind, towards=other % 4)
    yield sample("two classes", make(5, 2), target % 2)
    yield sample("empty batch", make(0, 10), target[:0])
