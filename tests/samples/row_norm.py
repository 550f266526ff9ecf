"""Sample calls of row_norm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from robustkern._dtypes import accumulation_dtype
from robustkern.ops.row_norm import row_norm
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make = make_tensor(device, dtype)
    weight = torch.tensor([0.5, 1.5, 2.0], device=device, dtype=accumulation_dtype(dtype))
    flat = ("second",)
    for p in (1.0, 2.0, math.inf, 3.0, 1.5):
        zero = flat if p == 1.0 or math.isinf(p) else ()
        yield Sample(row_norm, (make(4, 3, 5, 5),), {"p": p}, f"p={p}", zero=zero)
        yield Sample(row_norm, (make(4, 3, 5, 5),), {"p": p, "weight": weight}, f"p={p}, weight", zero=zero)
    yield Sample(row_norm, (make(4, 3, 5, 5),), {"squared": True}, "squared")
    yield Sample(row_norm, (make(4, 3, 5, 5),), {"squared": True, "weight": weight}, "squared, weight")
    yield Sample(row_norm, (make(4, 3, 5, 5),), {"weight": 0.25}, "number as weight")
    yield Sample(row_norm, (make(2, 3, 16, 16),), {"weight": weight.view(3, 1, 1)}, "long runs of one weight")
    yield Sample(
        row_norm, (make(4, 3, 5, 5).to(memory_format=torch.channels_last),), {"weight": weight}, "channels_last"
    )
    yield Sample(row_norm, (make(3, 4, 5, 5).transpose(0, 1),), {"weight": weight}, "batch not outermost")
    yield Sample(row_norm, (make(5, 34)[1:, 1::2],), {}, "strided columns")
    yield Sample(row_norm, (make(5, 35)[:, 2:],), {"p": 1.0}, "unaligned rows", zero=flat)
    yield Sample(row_norm, (make(6),), {}, "numbers as rows", zero=flat)
    yield Sample(row_norm, (make(1, 1),), {"p": 1.0}, "one element", zero=flat)
    yield Sample(row_norm, (make(2, 40000),), {}, "rows longer than a chunk")
    yield Sample(row_norm, (make(2, 40000),), {"p": math.inf}, "rows longer than a chunk, p=inf", zero=flat)
    yield Sample(row_norm, (make(0, 3, 5, 5),), {}, "empty batch", empty=True)
    yield Sample(row_norm, (make(3, 0),), {}, "empty rows", empty=True)
