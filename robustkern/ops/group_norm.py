"""group_norm: first and second derivative of F.group_norm, which `robustkern.install()` uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._double_backward import DoubleBackwardSample, nothing, register_double_backward
from robustkern.ops._samples import make_tensor
from robustkern.ops._select import accumulation_dtype

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


def _like(x: Tensor, needed: bool) -> Tensor:
    if not needed:
        return nothing(x)
    n, c, s = x.shape
    if channels_innermost(x):
        return x.new_empty([n, s, c]).transpose(1, 2)
    return x.new_empty([n, c, s])


def channels_innermost(x: Tensor) -> bool:
    """Whether x lies in memory as [N, S, C]."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def _vector(like: Tensor, size: int) -> Tensor:
    return like.new_empty([size], dtype=accumulation_dtype(like.dtype))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    channels = x.shape[1]
    return _like(x, need_x), _vector(x, channels if need_weight else 0), _vector(x, channels if need_bias else 0)


def _fake_double_backward(
    gg_x: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    need_grad: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    return _like(x, need_grad), _like(x, need_x), _vector(x, x.shape[1] if need_weight else 0)


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
        "gg_x": tensor(),
        "gg_weight": vectors[0],
        "gg_bias": vectors[1],
        "grad": tensor(),
        "x": x,
        "weight": vectors[2],
        "mean": mean,
        "rstd": (variance + 1e-5).rsqrt(),
        "groups": groups,
    }


def _needs(names: tuple[str, ...], *needed: str) -> dict[str, bool]:
    return {f"need_{name}": name in needed for name in names}


def _title(shape: tuple[int, int, int, int], innermost: bool) -> str:
    n, c, s, groups = shape
    return f"{n}x{c}x{s} in {groups}{' channels innermost' if innermost else ''}"


def _backward_samples(device: str, dtype: torch.dtype) -> Iterator[DoubleBackwardSample]:
    names = ("x", "weight", "bias")
    for innermost in (False, True):
        for shape in SHAPES:
            given = _inputs(device, dtype, shape, innermost)
            inputs = {name: given[name] for name in ("grad", "x", "weight", "mean", "rstd", "groups")}
            title = _title(shape, innermost)
            zero: tuple[int, ...] = () if given["x"].numel() else (1, 2)
            yield DoubleBackwardSample(title, inputs | _needs(names, *names), zero)
            if shape == SHAPES[0]:
                yield DoubleBackwardSample(f"{title} no weight", inputs | {"weight": None} | _needs(names, *names))
                for name in names:
                    yield DoubleBackwardSample(f"{title} {name} only", inputs | _needs(names, name))


def _double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DoubleBackwardSample]:
    names = ("grad", "x", "weight")
    cotangents = ("gg_x", "gg_weight", "gg_bias")
    for innermost in (False, True):
        for shape in SHAPES:
            inputs = _inputs(device, dtype, shape, innermost)
            title = _title(shape, innermost)
            input_gradient = inputs | {"gg_weight": None, "gg_bias": None}
            zero: tuple[int, ...] = () if inputs["x"].numel() else (2,)
            yield DoubleBackwardSample(title, input_gradient | _needs(names, *names), zero)
            yield DoubleBackwardSample(f"{title} every cotangent", inputs | _needs(names, *names), zero)
        inputs = _inputs(device, dtype, SHAPES[0], innermost)
        title = _title(SHAPES[0], innermost)
        yield DoubleBackwardSample(f"{title} no weight", inputs | {"weight": None} | _needs(names, *names))
        for only in names:
            yield DoubleBackwardSample(f"{title} {only} only", inputs | _needs(names, only))
        for only in cotangents:
            others = {name: None for name in cotangents if name != only}
            zero = {"gg_x": (), "gg_weight": (2,), "gg_bias": (1, 2)}[only]
            yield DoubleBackwardSample(f"{title} {only} alone", inputs | others | _needs(names, *names), zero)
        other = _inputs(device, dtype, SHAPES[0], not innermost)
        mixed = inputs | {"gg_x": other["gg_x"], "grad": inputs["grad"].flip(0, 2)}
        yield DoubleBackwardSample(f"{title} cotangents in another layout", mixed | _needs(names, *names))


register_double_backward(
    "group_norm_backward",
    ("grad_x", "grad_weight", "grad_bias"),
    _fake_backward,
    reference.group_norm_backward,
    _backward_samples,
)
register_double_backward(
    "group_norm_double_backward",
    ("gg_grad", "grad_x", "grad_weight"),
    _fake_double_backward,
    reference.group_norm_double_backward,
    _double_backward_samples,
)
