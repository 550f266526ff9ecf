"""Sample calls of attack_start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from robustkern.ops.attack_start import attack_start
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, op = make_tensor(device, dtype), attack_start
    seed = torch.tensor([0x0123456789ABCDEF], device=device)
    numbers = torch.tensor([7, 2**40, 0, 3, 5], device=device)

    def sample(name: str, *shape: int, **options: Any) -> Sample:
        x = make(*shape).abs().clamp(max=1.0)
        return Sample(op, (x,), {"eps": 0.1, "seed": seed, **options}, name, not x.numel())

    for norm, eps in (("linf", 0.1), ("l2", 0.7), ("l1", 2.0)):
        yield sample(norm, 5, 3, 4, 6, norm=norm, eps=eps)
        yield sample(f"{norm}, samples", 5, 3, 4, 6, norm=norm, eps=eps, samples=numbers, restart=3)
        yield sample(f"{norm}, odd rows", 3, 1, 37, 61, norm=norm, eps=10 * eps)
        yield sample(f"{norm}, one column", 5, 1, norm=norm, eps=eps)
        yield sample(f"{norm}, zero eps", 3, 10, norm=norm, eps=0.0)
    channels = torch.tensor([0.05, 0.1, 0.2], device=device, dtype=torch.float64).view(3, 1, 1)
    last = sample("channels_last", 5, 3, 4, 6, eps=channels)
    yield sample("eps a channel", 5, 3, 4, 6, eps=channels, seed=torch.tensor([-3], device=device))
    yield Sample(op, (last.inputs[0].to(memory_format=torch.channels_last),), last.options, last.name)
    yield sample("empty batch", 0, 3, 4, 6)
