"""Whether FSDP2 manages a model: its parameters are then replaced by whole ones and back while it is used."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def sharded_modules(model: object) -> Iterator[Any]:
    """The modules of a model that `torch.distributed.fsdp.fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing can have been sharded
    if fsdp is not None and isinstance(model, nn.Module):
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def is_sharded(model: object) -> bool:
    return next(sharded_modules(model), None) is not None
