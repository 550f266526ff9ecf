"""Sample calls of attack_step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern.ops.attack_step import attack_step
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, op = make_tensor(device, dtype), attack_step

    def images(*shape: int) -> Tensor:
        x = make(*shape).abs().clamp(max=1.0)
        return x - (x > 0.9) * (x - 1.0) if x.numel() else x  # some pixels at the ends

    def sample(name: str, *shape: int, grad: Tensor | None = None, **options: Any) -> Sample:
        x = images(*shape)
        near = (x + 0.1 * make(*shape)).clamp(0.0, 1.0)
        given = {"eps": 0.1, "step_size": 0.05, **options}
        return Sample(op, (near, x, make(*shape) if grad is None else grad), given, name, not x.numel())

    channels = torch.tensor([0.05, 0.1, 0.2], device=device, dtype=torch.float64).view(3, 1, 1)
    for norm, eps in (("linf", 0.1), ("l2", 0.7), ("l1", 2.0)):
        yield sample(f"{norm}", 5, 3, 4, 6, norm=norm, eps=eps, step_size=eps / 3)
        yield sample(f"{norm}, inside", 5, 3, 4, 6, norm=norm, eps=100.0, step_size=0.5)
        scale = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0], device=device, dtype=torch.float64)
        yield sample(f"{norm}, scale", 5, 3, 4, 6, norm=norm, eps=eps, step_size=eps, scale=scale)
        yield sample(f"{norm}, long rows", 2, 3, 60, 61, norm=norm, eps=10 * eps, step_size=eps, coordinates=40)
        yield sample(f"{norm}, one column", 5, 1, norm=norm, eps=eps, step_size=eps)
        yield sample(f"{norm}, no gradient", 4, 30, grad=torch.zeros(4, 30, device=device, dtype=dtype), norm=norm)
        yield sample(f"{norm}, tiny gradients", 4, 30, grad=(1e-6 * make(4, 30)), norm=norm, eps=eps)
        yield sample(f"{norm}, zero eps", 4, 30, norm=norm, eps=0.0)
    yield sample("eps a channel", 5, 3, 4, 6, eps=channels, step_size=channels / 4)
    yield sample("eps a pixel", 5, 3, 4, 6, eps=make(4, 6).abs(), step_size=0.1)
    last = sample("channels_last", 5, 3, 4, 6, eps=channels, step_size=channels / 4)
    yield Sample(op, tuple(t.to(memory_format=torch.channels_last) for t in last.inputs), last.options, last.name)
    mixed = sample("mixed layouts", 5, 3, 4, 6, norm="l2")
    layouts = (torch.channels_last, torch.contiguous_format, torch.channels_last)
    yield Sample(
        op, tuple(t.contiguous(memory_format=f) for t, f in zip(mixed.inputs, layouts)), mixed.options, mixed.name
    )
    strided = sample("strided", 5, 3, 4, 12, norm="l2")
    yield Sample(op, tuple(t[..., ::2] for t in strided.inputs), strided.options, strided.name)
    yield sample("l1, several coordinates", 5, 3, 4, 6, norm="l1", eps=2.0, step_size=1.0, coordinates=7)
    yield sample("empty batch", 0, 3, 4, 6)
