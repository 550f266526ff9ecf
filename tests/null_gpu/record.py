"""What a program asks of the null GPU, from within the program."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launch:
    """A kernel's start; stream 0 is the default one."""

    kernel: str  # mangled
    grid: tuple[int, ...]
    block: tuple[int, ...]
    dynamic_shared: int
    stream: int
    device: int

    @property
    def ours(self) -> bool:
        return "2rk4cuda" in self.kernel


@dataclass
class Record:
    """What was asked for, in its order."""

    launches: list[Launch] = field(default_factory=list)
    refused: list[Launch] = field(default_factory=list)  # that no device would start
    waits: list[str] = field(default_factory=list)  # functions that wait for the device
    library: list[str] = field(default_factory=list)  # calls of cuBLAS and cuDNN that compute
    other: list[str] = field(default_factory=list)  # copies, fills, allocations, recordings and replays of graphs

    @property
    def ours(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.ours]

    def take(self, lines: str) -> None:
        for line in lines.splitlines():
            kind, *rest = line.split()
            if kind in ("launch", "refused"):
                numbers = [int(n, 0) for n in rest[1:]]
                launch = Launch(rest[0], tuple(numbers[:3]), tuple(numbers[3:6]), *numbers[6:])
                (self.launches if kind == "launch" else self.refused).append(launch)
            elif kind in ("wait", "library"):
                (self.waits if kind == "wait" else self.library).append(rest[0])
            else:
                self.other.append(line)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.null_gpu_log.restype = ctypes.c_char_p
    return library


def is_there() -> bool:
    """Whether this process runs on the null GPU."""
    return hasattr(ctypes.CDLL(None), "null_gpu_log")


@contextmanager
def recording() -> Iterator[Record]:
    """What is asked for inside a with statement, complete after it."""
    library, record = _library(), Record()
    outer = library.null_gpu_record(1)
    start = len(library.null_gpu_log())
    try:
        yield record
    finally:
        record.take(library.null_gpu_log()[start:].decode())
        library.null_gpu_record(outer)
        if not outer:
            library.null_gpu_clear()
