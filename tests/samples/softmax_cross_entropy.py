"""Sample calls of softmax_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, op = make_tensor(device, dtype), softmax_cross_entropy
    classes = torch.tensor([3, 0, 9, 3, 5], device=device)
    soft = make(5, 10).float().softmax(1).to(dtype)
    yield Sample(op, (make(5, 10), classes), {}, "classes")
    yield Sample(op, (make(5, 10), classes), {"label_smoothing": 0.1}, "classes, smoothing")
    yield Sample(op, (make(5, 10), classes), {"temperature": 2.5, "label_smoothing": 0.1}, "classes, temperature")
    yield Sample(op, (make(5, 10), classes), {"ignore_index": 3}, "ignore_index")
    yield Sample(op, (make(5, 10), soft), {}, "probabilities")
    yield Sample(op, (make(5, 10), soft), {"label_smoothing": 0.2, "temperature": 0.5}, "probabilities, all options")
    yield Sample(op, (make(5, 10), 3.0 * soft), {}, "probabilities that sum to 3")
    yield Sample(op, (make(5, 20)[:, ::2], classes), {}, "strided columns")
    yield Sample(op, (make(10, 5).t(), soft), {}, "transposed")
    yield Sample(op, (make(2, 3, 4, 5), torch.arange(40, device=device).view(2, 4, 5) % 3), {}, "a class a pixel")
    yield Sample(op, (1000.0 + 3.0 * make(5, 10), classes), {}, "huge logits")
    yield Sample(op, (make(4, 3000), classes[:4] * 300), {"label_smoothing": 0.1}, "3000 classes")
    many = 3.0 * make(33, 300).float().softmax(1).to(dtype)
    yield Sample(
        op, (make(33, 300), many), {"label_smoothing": 0.1, "temperature": 2.0}, "300 probabilities, all options"
    )
    yield Sample(op, (make(4, 300), classes[:4]), {"ignore_index": 9, "temperature": 0.5}, "300 classes, ignore_index")
    nothing = ("value", "grad_x", "gg_grad", "second")
    yield Sample(op, (make(3, 1), torch.zeros(3, dtype=torch.long, device=device)), {}, "one class", zero=nothing)
    yield Sample(op, (make(0, 10), classes[:0]), {}, "empty batch", empty=True)
