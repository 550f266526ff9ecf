"""Activation checkpointing by block: memory for one more forward pass in each backward pass."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustkern.distributed import blocks

from .errors import require


def recompute_blocks(model: nn.Module) -> None:
    """Makes every innermost block of a network keep its inputs only, in place; see `robustkern.distributed.blocks`.

    Not by reentrant checkpoints, which know no `autograd.grad`. Copies of the model do the same.

    Raises:
        UsageError: It has no blocks.
    """
    found = blocks(model)
    require(bool(found), "recompute takes a network of blocks, modules of its own in a Sequential or ModuleList")
    for block in found:
        if not any(other is not block and other in found for other in block.modules()):
            kind: Any = type(block)
            block.__class__ = _recomputed(kind)


@functools.cache
def _recomputed(kind: Any) -> Any:
    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **options)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _KeptStatistics(self)  # entered once for each backward pass

        return checkpoint(
            functools.partial(kind.forward, self), *args, use_reentrant=False, context_fn=contexts, **options
        )

    return type(f"Recomputed{kind.__name__}", (kind,), {"forward": forward, "__module__": kind.__module__})


class _KeptStatistics:
    """Within, BatchNorm updates its running statistics as in the first pass; afterwards they are as before."""

    def __init__(self, block: nn.Module) -> None:
        modules = [module for module in block.modules() if module.training]
        self._buffers: list[Tensor] = [buffer for module in modules for buffer in module.buffers(recurse=False)]
        self._before: list[Tensor] = []

    def __enter__(self) -> None:
        self._before = [buffer.detach().clone() for buffer in self._buffers]

    def __exit__(self, *exception: object) -> None:
        for buffer, value in zip(self._buffers, self._before, strict=True):
            buffer.data.copy_(value)  # not counted as a change: the graph has saved the buffer
