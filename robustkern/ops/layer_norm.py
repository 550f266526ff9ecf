"""layer_norm: first and second derivative of F.layer_norm and F.rms_norm, which `robustkern.install()` uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._double_backward import DoubleBackwardSample, nothing, register_double_backward
from robustkern.ops._samples import make_tensor
from robustkern.ops._select import accumulation_dtype

# rows and columns: short and long rows, several chunks of rows, rows of more than one piece, nothing at all
SHAPES = ((5, 8), (70, 3), (130, 33), (9, 1500), (2, 2051), (5, 9001), (0, 4), (4, 0))
SEVERAL = ((5, 8), (130, 33), (9, 1500), (5, 9001))  # with several cotangents


def _vector(like: Tensor, size: int) -> Tensor:
    return like.new_empty([size], dtype=accumulation_dtype(like.dtype))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    columns = x.shape[1]
    return (
        x.new_empty(grad.shape) if need_x else nothing(x),
        _vector(x, columns if need_weight else 0),
        _vector(x, columns if need_bias else 0),
    )


def _fake_double_backward(
    gg_x: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    need_grad: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(grad.shape) if need_grad else nothing(x),
        x.new_empty(x.shape) if need_x else nothing(x),
        _vector(x, x.shape[1] if need_weight else 0),
    )


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
        "gg_x": make(*several, rows, columns),
        "gg_weight": None if several else vectors[0],
        "gg_bias": None if several else vectors[1],
        "grad": make(*several, rows, columns),
        "x": x,
        "weight": vectors[2],
        "mean": mean,
        "rstd": (variance + 1e-5).rsqrt(),
    }


def _needs(names: tuple[str, ...], *needed: str) -> dict[str, bool]:
    return {f"need_{name}": name in needed for name in names}


def _backward_samples(device: str, dtype: torch.dtype) -> Iterator[DoubleBackwardSample]:
    names = ("x", "weight", "bias")
    for rms in (False, True):
        for rows, columns in SHAPES:
            given = _row_inputs(device, dtype, rows, columns, rms)
            inputs = {name: given[name] for name in ("grad", "x", "weight", "mean", "rstd")}
            title = f"{'rms ' if rms else ''}{rows}x{columns}"
            zero: tuple[int, ...] = () if rows else (1, 2)
            yield DoubleBackwardSample(title, inputs | _needs(names, *names), zero)
            if (rows, columns) == SHAPES[0]:
                yield DoubleBackwardSample(f"{title} no weight", inputs | {"weight": None} | _needs(names, *names))
                for name in names:
                    yield DoubleBackwardSample(f"{title} {name} only", inputs | _needs(names, name))
            for count in (0, 1, 3) if (rows, columns) in SEVERAL else ():
                several = inputs | {"grad": _row_inputs(device, dtype, rows, columns, rms, count)["grad"]}
                yield DoubleBackwardSample(f"{title} {count} cotangents", several | _needs(names, "x"))


def _double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DoubleBackwardSample]:
    names = ("grad", "x", "weight")
    cotangents = ("gg_x", "gg_weight", "gg_bias")
    for rms in (False, True):
        for rows, columns in SHAPES:
            inputs = _row_inputs(device, dtype, rows, columns, rms)
            title = f"{'rms ' if rms else ''}{rows}x{columns}"
            input_gradient = inputs | {"gg_weight": None, "gg_bias": None}
            zero: tuple[int, ...] = () if rows else (2,)
            yield DoubleBackwardSample(title, input_gradient | _needs(names, *names), zero)
            yield DoubleBackwardSample(f"{title} every cotangent", inputs | _needs(names, *names), zero)
            if (rows, columns) in SEVERAL:
                several = _row_inputs(device, dtype, rows, columns, rms, 3)
                yield DoubleBackwardSample(f"{title} 3 cotangents", several | _needs(names, *names))
        inputs = _row_inputs(device, dtype, *SHAPES[0], rms)
        title = "rms" if rms else "layer norm"
        yield DoubleBackwardSample(f"{title} no weight", inputs | {"weight": None} | _needs(names, *names))
        for only in names:
            yield DoubleBackwardSample(f"{title} {only} only", inputs | _needs(names, only))
        for count in (0, 1):
            several, zero = _row_inputs(device, dtype, *SHAPES[0], rms, count), () if count else (1, 2)
            yield DoubleBackwardSample(f"{title} {count} cotangents", several | _needs(names, *names), zero)
        for only in names:
            several = _row_inputs(device, dtype, *SHAPES[0], rms, 2)
            yield DoubleBackwardSample(f"{title} 2 cotangents, {only} only", several | _needs(names, only))
        for only in cotangents:
            others = {name: None for name in cotangents if name != only}
            zero = {"gg_x": (), "gg_weight": (2,), "gg_bias": (1, 2)}[only]
            yield DoubleBackwardSample(f"{title} {only} alone", inputs | others | _needs(names, *names), zero)
        transposed = {
            name: inputs[name].t().contiguous().t() if name in ("gg_x", "grad", "x") else inputs[name]
            for name in inputs
        }
        yield DoubleBackwardSample(f"{title} transposed", transposed | _needs(names, *names))


register_double_backward(
    "layer_norm_backward",
    ("grad_x", "grad_weight", "grad_bias"),
    _fake_backward,
    reference.layer_norm_backward,
    _backward_samples,
)
register_double_backward(
    "layer_norm_double_backward",
    ("gg_grad", "grad_x", "grad_weight"),
    _fake_double_backward,
    reference.layer_norm_double_backward,
    _double_backward_samples,
)
