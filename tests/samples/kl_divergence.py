"""Sample calls of kl_divergence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from robustkern.ops.kl_divergence import kl_divergence
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, op = make_tensor(device, dtype), kl_divergence
    yield Sample(op, (make(5, 10), make(5, 10)), {}, "ten classes")
    yield Sample(op, (make(5, 10), make(5, 10)), {"temperature": 2.5}, "temperature")
    yield Sample(op, (4.0 * make(8, 1000), make(8, 1000)), {}, "1000 classes")
    yield Sample(op, (make(8, 3000), 3.0 * make(8, 3000)), {"temperature": 2.0}, "3000 classes, temperature")
    yield Sample(op, (make(40, 7), make(40, 7)), {}, "40 rows")
    yield Sample(op, (make(35, 100), 2.0 * make(35, 100)), {}, "100 classes")
    yield Sample(op, (make(5, 20)[:, ::2], make(5, 10)), {}, "strided columns")
    yield Sample(op, (make(10, 5).t(), make(10, 5).t()), {}, "transposed")
    yield Sample(op, (make(2, 3, 4, 5), make(2, 3, 4, 5)), {}, "a prediction a pixel")
    yield Sample(op, (1000.0 + 3.0 * make(5, 10), 3.0 * make(5, 10)), {}, "huge logits")
    yield Sample(op, (6.0 * make(5, 10), 6.0 * make(5, 10)), {}, "certain predictions")
    nothing = ("value", "grad_x", "gg_grad", "second")
    yield Sample(op, (make(3, 1), make(3, 1)), {}, "one class", zero=nothing)
    yield Sample(op, (make(0, 10), make(0, 10)), {}, "empty batch", empty=True)
