"""Sample calls of random_cotangents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern.ops.random_cotangents import LAWS, random_cotangents
from tests.samples import Sample, make_tensor


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, op = make_tensor(device, dtype), random_cotangents
    seed = torch.tensor([0x0123456789ABCDEF], device=device)

    def sample(name: str, outputs: Tensor, projections: int = 3, **options: Any) -> Sample:
        fisher = options.get("kind") == "fisher"
        given = {"projections": projections, "seed": seed, **options}
        zero = ("gg_grad", "second") if fisher else ("grad_x", "gg_grad", "second")
        return Sample(op, (outputs,), given, name, not outputs.numel(), zero, orders=1 if fisher else 0)

    for law in LAWS:
        yield sample(f"{law}, fisher", 2 * make(5, 10), law=law, kind="fisher")
        yield sample(f"{law}, fisher, positions", 2 * make(2, 3, 4, 5), law=law, kind="fisher")
        for kind in ("plain", "centred"):
            yield sample(f"{law}, {kind}", make(5, 10), law=law, kind=kind)
            yield sample(f"{law}, {kind}, positions", make(2, 3, 4, 5), law=law, kind=kind)
        yield sample(f"{law}, 300 classes", make(3, 300), law=law, kind="fisher")
        yield sample(f"{law}, two classes", make(40, 2), 2, law=law, kind="fisher")
    yield sample("orthonormal, all directions", make(3, 37), 37, law="orthonormal", kind="fisher")
    yield sample("orthonormal, all directions, plain", make(3, 37), 37, law="orthonormal")
    yield sample("another seed", make(5, 10), kind="fisher", seed=torch.tensor([-3], device=device))
    yield sample("one number", make(4, 1), 1)
    yield sample("strided columns", make(5, 20)[:, ::2], kind="fisher")
    yield sample("transposed", make(10, 5).t(), kind="fisher")
    yield sample("channels_last", make(2, 3, 4, 5).to(memory_format=torch.channels_last), kind="fisher")
    yield sample("huge outputs", 1000.0 + 3.0 * make(5, 10), kind="fisher")
    yield sample("empty batch", make(0, 10), law="orthonormal", kind="fisher")
    yield sample("no positions", make(2, 3, 0), kind="fisher")
