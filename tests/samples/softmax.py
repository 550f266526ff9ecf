"""Sample calls of the derivatives of softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.samples import DerivativeSample, make_tensor


def double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    make = make_tensor(device, dtype)

    def sample(
        name: str, *shape: int, log: bool = True, needs: tuple[bool, bool] = (True, True), zero: tuple[int, ...] = ()
    ) -> DerivativeSample:
        x = make(*shape)
        output = (torch.log_softmax(2 * x, 1) if log else torch.softmax(2 * x, 1)) if x.numel() else x
        arguments = {"u": make(*shape), "grad": make(*shape), "output": output, "log": log}
        return DerivativeSample(name, {**arguments, "need_grad": needs[0], "need_output": needs[1]}, zero)

    for log in (True, False):
        kind = "log_softmax" if log else "softmax"
        yield sample(f"{kind}, rows", 6, 10, 1, log=log)
        yield sample(f"{kind}, images", 3, 5, 12, log=log)
        yield sample(f"{kind}, rows longer than a piece", 3, 2500, 1, log=log)
        yield sample(f"{kind}, large images", 2, 3, 2500, log=log)
        yield sample(f"{kind}, many classes of images", 2, 900, 70, log=log)
        yield sample(f"{kind}, gg_grad only", 6, 33, 1, log=log, needs=(True, False))
        yield sample(f"{kind}, grad_output only", 3, 5, 12, log=log, needs=(False, True))
    yield sample("many rows", 3000, 10, 1)
    yield sample("one class, log_softmax", 4, 1, 3, zero=(0,))
    yield sample("empty batch", 0, 5, 1)
    yield sample("empty images", 2, 5, 0)
