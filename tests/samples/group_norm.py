"""Sample calls of the derivatives of group_norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype
from tests.samples import DerivativeSample, make_tensor, needs

# samples, channels, positions, groups: one channel a group, one group, single positions, planes of more than one
# piece, samples of more than one chunk of positions, nothing at all
SHAPES = (
    (2, 6, 5, 3),
    (3, 12, 1, 2),
    (2, 4, 9, 4),
    (1, 6, 16, 1),
    (1, 4, 1100, 2),
    (2, 96, 70, 32),
    (1, 1300, 5, 4),
    (0, 4, 3, 2),
    (2, 4, 0, 2),
)


def _inputs(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], innermost: bool) -> dict[str, Any]:
    make, accumulation = make_tensor(device, dtype), accumulation_dtype(dtype)
    n, c, s, groups = shape

    def tensor() -> Tensor:
        t = make(n, c, s)
        return t.transpose(1, 2).contiguous().transpose(1, 2) if innermost else t

    x = tensor()
    rows = x.to(accumulation).reshape(n, groups, c // groups * s)
    mean = rows.mean(2) if s else rows.new_zeros(n, groups)
    variance = (rows - mean[:, :, None]).square().mean(2) if s else rows.new_zeros(n, groups)
    vectors = [make(c).to(accumulation) for _ in range(3)]
    return {
        "u": tensor(),
        "a": vectors[0],
        "b": vectors[1],
        "grad": tensor(),
        "x": x,
        "weight": vectors[2],
        "mean": mean,
        "rstd": (variance + 1e-5).rsqrt(),
        "groups": groups,
    }


def _title(shape: tuple[int, int, int, int], innermost: bool) -> str:
    n, c, s, groups = shape
    return f"{n}x{c}x{s} in {groups}{' channels innermost' if innermost else ''}"


def backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    names = ("x", "weight", "bias")
    for innermost in (False, True):
        for shape in SHAPES:
            given = _inputs(device, dtype, shape, innermost)
            inputs = {name: given[name] for name in ("grad", "x", "weight", "mean", "rstd", "groups")}
            title = _title(shape, innermost)
            zero: tuple[int, ...] = () if given["x"].numel() else (1, 2)
            yield DerivativeSample(title, inputs | needs(names, *names), zero)
            if shape == SHAPES[0]:
                yield DerivativeSample(f"{title} no weight", inputs | {"weight": None} | needs(names, *names))
                for name in names:
                    yield DerivativeSample(f"{title} {name} only", inputs | needs(names, name))


def double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    names = ("grad", "x", "weight")
    cotangents = ("u", "a", "b")
    for innermost in (False, True):
        for shape in SHAPES:
            inputs = _inputs(device, dtype, shape, innermost)
            title = _title(shape, innermost)
            input_gradient = inputs | {"a": None, "b": None}
            zero: tuple[int, ...] = () if inputs["x"].numel() else (2,)
            yield DerivativeSample(title, input_gradient | needs(names, *names), zero)
            yield DerivativeSample(f"{title} every cotangent", inputs | needs(names, *names), zero)
        inputs = _inputs(device, dtype, SHAPES[0], innermost)
        title = _title(SHAPES[0], innermost)
        yield DerivativeSample(f"{title} no weight", inputs | {"weight": None} | needs(names, *names))
        for only in names:
            yield DerivativeSample(f"{title} {only} only", inputs | needs(names, only))
        for only in cotangents:
            others = {name: None for name in cotangents if name != only}
            zero = {"u": (), "a": (2,), "b": (1, 2)}[only]
            yield DerivativeSample(f"{title} {only} alone", inputs | others | needs(names, *names), zero)
        other = _inputs(device, dtype, SHAPES[0], not innermost)
        mixed = inputs | {"u": other["u"], "grad": inputs["grad"].flip(0, 2)}
        yield DerivativeSample(f"{title} cotangents in another layout", mixed | needs(names, *names))
