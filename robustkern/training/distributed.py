"""The processes that train one model together, as torchrun starts them; one process alone is a group too."""

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from robustkern.sharding import sum_

from .errors import TrainingError, UsageError

T = TypeVar("T")
# In errors that have no type of their own.
_BACKEND = re.compile("gloo|nccl|connection (closed|reset)|time(d )?out|pair closure|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """Processes that train together.

    All must call the same methods in the same order: in every method each process waits for the others.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where exchanged tensors are: "cpu" for gloo, "cuda" for NCCL.
        timeout: Seconds after which a process gives up on the others.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    timeout: float = 600.0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """tensor = its sum over all processes, in place, to the same bits on all of them."""
        if self.size > 1:
            with self._contact():
                sum_(tensors)

    def sum(self, value: float) -> float:
        """The sum of a number over all processes; exact for integers below 2^53."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.sum_([total])
        return float(total.item())

    def broadcast(self, value: T) -> T:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        box = [value if self.main else None]
        with self._contact():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs `function` on process 0 alone; returns or raises the same on all."""
        return self.broadcast(self.on_all(lambda: function() if self.main else None))  # type: ignore[return-value]

    def on_all(self, function: Callable[[], T]) -> T:
        """Runs `function` on every process, and returns its result; if it fails on one, all raise that error."""
        if self.size == 1:
            return function()
        result: T | None = None
        failure: Exception | None = None
        try:
            result = function()
        except Exception as error:
            failure = error
        failures: list[Exception | None] = [None] * self.size
        with self._contact():
            dist.all_gather_object(failures, failure)
        first = next((error for error in (failure, *failures) if error is not None), None)
        if first is not None:
            raise first
        return result  # type: ignore[return-value]

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Around what sends by itself, such as a backward pass: an error of the backend is that of `sum_`."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or _BACKEND.search(str(error))):
                raise
            with self._contact():
                raise

    @contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TrainingError(
                f"process {self.rank} of {self.size} lost the others: one of them ended, or gave no answer for "
                f"{self.timeout:g} s; --resume goes on from the last checkpoint ({reason})"
            ) from error


def settle_imports() -> None:
    """Imports, before a group begins, the modules of PyTorch that keep the current group as the default of an argument.

    The optimizers import them. If that happens while a group exists, they hold it forever: destroying it then does not
    end gloo's threads, and a thread that still releases a tensor when the interpreter ends aborts the process.
    """
    importlib.import_module("torch._dynamo")


@contextmanager
def process_group(device: str, timeout: float = 600.0) -> Iterator[Group]:
    """The group of this process: torchrun's, one that the program has initialised already, or itself alone.

    Args:
        device: "cpu": gloo; "cuda": NCCL, each process on the GPU of its LOCAL_RANK.
        timeout: Seconds that a process may keep the others waiting.

    Raises:
        UsageError: The environment is not one that torchrun makes, or there are fewer GPUs than processes.
        TrainingError: The processes do not find each other.
    """
    if dist.is_available() and dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size(), device, timeout)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group(device=device)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not dist.is_available():
        why = f"{', '.join(missing)} not set" if missing else "this PyTorch has no torch.distributed"
        raise UsageError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {why}: start the processes with torchrun")
    group = Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, timeout)
    settle_imports()
    limit = timedelta(seconds=timeout)
    with group._contact():
        if device == "cuda":
            store = _store_of_processes_with_gpus(group, limit)
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl", store=store, rank=group.rank, world_size=group.size, timeout=limit)
        else:
            dist.init_process_group("gloo", timeout=limit)
    try:
        yield group
    finally:
        dist.destroy_process_group()


def _store_of_processes_with_gpus(group: Group, limit: timedelta) -> dist.Store:
    """The store where the processes meet. One process without a GPU is an error in all: NCCL would wait for it."""
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    problem = f"process {group.rank} has no GPU: it is number {local} of its machine, which has {count}"
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    store.set(f"gpu-{group.rank}", problem if local >= count else "found")
    answers = [store.get(f"gpu-{rank}").decode() for rank in range(group.size)]
    store.set(f"told-{group.rank}", "")
    if group.main:  # the store may live in this process, which must not end before the others have read
        store.wait([f"told-{rank}" for rank in range(group.size)])
    for answer in answers:
        if answer != "found":
            raise UsageError(answer)
    return dist.PrefixStore("default_pg", store)
