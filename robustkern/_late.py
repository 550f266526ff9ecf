"""Numbers that a device has computed, read without waiting for it: later, when it is through anyway."""

from __future__ import annotations

import atexit
from collections.abc import Callable

import torch
from torch import Tensor

Check = Callable[[list[float]], None]


def must_wait(tensor: Tensor) -> bool:
    """Whether reading a number of this tensor would wait for a device."""
    return tensor.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling()


class Late:
    """A copy of a vector on its way to the host; `read` waits for what the device was given before it, no more."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


_open: list[tuple[Late, Check]] = []


def check_late(values: Tensor, check: Check) -> None:
    """Calls check(numbers), which may raise, when this is called for the next time, or the program ends."""
    settle()
    _open.append((Late(values), check))


def settle() -> None:
    """Makes the checks that are due."""
    while _open:
        late, check = _open.pop(0)
        check(late.read())


atexit.register(settle)
