"""softmax_double_backward: the second derivative of softmax and log_softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._double_backward import DoubleBackwardSample, nothing, register_double_backward
from robustkern.ops._samples import make_tensor


def _fake(
    gg_x: Tensor, grad: Tensor, output: Tensor, log: bool, need_grad: bool, need_output: bool
) -> tuple[Tensor, Tensor]:
    def result(needed: bool) -> Tensor:
        return output.new_empty(output.shape) if needed else nothing(output)

    return result(need_grad), result(need_output)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[DoubleBackwardSample]:
    """Calls that exercise every option and shape class."""
    make = make_tensor(device, dtype)

    def sample(
        name: str, *shape: int, log: bool = True, needs: tuple[bool, bool] = (True, True), zero: tuple[int, ...] = ()
    ) -> DoubleBackwardSample:
        x = make(*shape)
        output = (torch.log_softmax(2 * x, 1) if log else torch.softmax(2 * x, 1)) if x.numel() else x
        arguments = {"gg_x": make(*shape), "grad": make(*shape), "output": output, "log": log}
        return DoubleBackwardSample(name, {**arguments, "need_grad": needs[0], "need_output": needs[1]}, zero)

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


register_double_backward(
    "softmax_double_backward", ("gg_grad", "grad_output"), _fake, reference.softmax_double_backward, samples
)
