"""Sample calls of the derivatives of layer_norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from robustkern._dtypes import accumulation_dtype
from tests.samples import DerivativeSample, make_tensor, needs

# rows and columns: short and long rows, several chunks of rows, rows of more than one piece, nothing at all
SHAPES = ((5, 8), (70, 3), (130, 33), (9, 1500), (2, 2051), (5, 9001), (0, 4), (4, 0))


SEVERAL = ((5, 8), (130, 33), (9, 1500), (5, 9001))  # with several cotangents


def _row_inputs(
    device: str, dtype: torch.dtype, rows: int, columns: int, rms: bool, cotangents: int | None = None
) -> dict[str, Any]:
    several = () if cotangents is None else (cotangents,)
    make, accumulation = make_tensor(device, dtype), accumulation_dtype(dtype)
    x = make(rows, columns)
    wide = x.to(accumulation)
    mean = None if rms else wide.mean(1) if columns else wide.new_zeros(rows)
    centred = wide if mean is None else wide - mean[:, None]
    variance = centred.square().mean(1) if columns else wide.new_zeros(rows)
    vectors = [make(columns).to(accumulation) for _ in range(3)]
    return {
        "u": make(*several, rows, columns),
        "a": None if several else vectors[0],
        "b": None if several else vectors[1],
        "grad": make(*several, rows, columns),
        "x": x,
        "weight": vectors[2],
        "mean": mean,
        "rstd": (variance + 1e-5).rsqrt(),
    }


def backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    names = ("x", "weight", "bias")
    for rms in (False, True):
        for rows, columns in SHAPES:
            given = _row_inputs(device, dtype, rows, columns, rms)
            inputs = {name: given[name] for name in ("grad", "x", "weight", "mean", "rstd")}
            title = f"{'rms ' if rms else ''}{rows}x{columns}"
            zero: tuple[int, ...] = () if rows else (1, 2)
            yield DerivativeSample(title, inputs | needs(names, *names), zero)
            if (rows, columns) == SHAPES[0]:
                yield DerivativeSample(f"{title} no weight", inputs | {"weight": None} | needs(names, *names))
                for name in names:
                    yield DerivativeSample(f"{title} {name} only", inputs | needs(names, name))
            for count in (0, 1, 3) if (rows, columns) in SEVERAL else ():
                several = inputs | {"grad": _row_inputs(device, dtype, rows, columns, rms, count)["grad"]}
                yield DerivativeSample(f"{title} {count} cotangents", several | needs(names, "x"))


def double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    names = ("grad", "x", "weight")
    cotangents = ("u", "a", "b")
    for rms in (False, True):
        for rows, columns in SHAPES:
            inputs = _row_inputs(device, dtype, rows, columns, rms)
            title = f"{'rms ' if rms else ''}{rows}x{columns}"
            input_gradient = inputs | {"a": None, "b": None}
            zero: tuple[int, ...] = () if rows else (2,)
            yield DerivativeSample(title, input_gradient | needs(names, *names), zero)
            yield DerivativeSample(f"{title} every cotangent", inputs | needs(names, *names), zero)
            if (rows, columns) in SEVERAL:
                several = _row_inputs(device, dtype, rows, columns, rms, 3)
                yield DerivativeSample(f"{title} 3 cotangents", several | needs(names, *names))
        inputs = _row_inputs(device, dtype, *SHAPES[0], rms)
        title = "rms" if rms else "layer norm"
        yield DerivativeSample(f"{title} no weight", inputs | {"weight": None} | needs(names, *names))
        for only in names:
            yield DerivativeSample(f"{title} {only} only", inputs | needs(names, only))
        for count in (0, 1):
            several, zero = _row_inputs(device, dtype, *SHAPES[0], rms, count), () if count else (1, 2)
            yield DerivativeSample(f"{title} {count} cotangents", several | needs(names, *names), zero)
        for only in names:
            several = _row_inputs(device, dtype, *SHAPES[0], rms, 2)
            yield DerivativeSample(f"{title} 2 cotangents, {only} only", several | needs(names, only))
        for only in cotangents:
            others = {name: None for name in cotangents if name != only}
            zero = {"u": (), "a": (2,), "b": (1, 2)}[only]
            yield DerivativeSample(f"{title} {only} alone", inputs | others | needs(names, *names), zero)
        transposed = {
            name: inputs[name].t().contiguous().t() if name in ("u", "grad", "x") else inputs[name] for name in inputs
        }
        yield DerivativeSample(f"{title} transposed", transposed | needs(names, *names))
