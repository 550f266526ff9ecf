"""Which part of a batch a process has, so that results do not depend on how many processes share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Rows offset, ..., offset + size - 1 of a batch of `total` rows; other processes have the rest.

    A loss draws a sample's random numbers by its row in the whole batch, so that two processes with half the batch each
    get the numbers that one process with all of it gets.  The processes' means over their rows, each times its `share`,
    add up to the mean over the batch.

    Attributes:
        offset: First row.
        size: Number of rows, at least 1.
        total: Rows of the whole batch.
        idle: Whether these rows belong to another process and count for nothing here: a process that gets no
            row of a small last batch still takes part in every collective operation.
    """

    offset: int
    size: int
    total: int
    idle: bool = False

    def __post_init__(self) -> None:
        if not (self.offset >= 0 and self.size >= 1 and self.offset + self.size <= self.total):
            raise ValueError(
                f"Shard: rows must lie in the batch, got {self.size} from {self.offset} on, of {self.total} in all"
            )

    @classmethod
    def of(cls, rank: int, world_size: int, total: int) -> Shard:
        """The part of process `rank`: contiguous rows, in the order of the ranks; sizes differ by at most one."""
        begin, end = (index * total // world_size for index in (rank, rank + 1))
        return cls(begin, end - begin, total) if end > begin else cls(0, 1, total, idle=True)

    @property
    def share(self) -> float:
        """The weight of a mean over these rows in the mean over the batch."""
        return 0.0 if self.idle else self.size / self.total

    def samples(self, device: torch.device | str = "cpu") -> Tensor:
        """The number of each row in the whole batch, which attacks take as `indices`.  [size] int64"""
        return torch.arange(self.offset, self.offset + self.size, device=device)

    def rows(self, whole: Tensor) -> Tensor:
        """These rows of what was drawn for the whole batch."""
        if len(whole) != self.total:
            raise ValueError(f"Shard.rows: expected {self.total} rows, those of the whole batch, got {len(whole)}")
        return whole[self.offset : self.offset + self.size]

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """tensor = sum over the processes of share * tensor, in place; without other processes, tensor * share.

        Every process must call it, with tensors of the same shapes.  It serves what a loss computes from the whole
        batch before its own backward pass, such as the direction of an adversarial weight perturbation.
        """
        for tensor in tensors:
            tensor.mul_(self.share)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sum_(tensors)


def sum_(tensors: Sequence[Tensor]) -> None:
    """tensor = its sum over all processes, in place: one message for all tensors, which must have one dtype."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
