"""Models that FSDP2 manages: their parameters are parts of tensors, and whole ones only while they are used."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def sharded_modules(model: object) -> Iterator[Any]:
    """The modules of a model that `torch.distributed.fsdp.fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing can have been sharded
    if fsdp is not None and isinstance(model, nn.Module):
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def is_sharded(model: object) -> bool:
    return next(sharded_modules(model), None) is not None


def whole(value: Any, keep: bool = True) -> Any:
    """The same with every divided tensor put together, on the CPU; all processes must call it.

    Args:
        value: A tensor, or mappings and lists of them and of anything else.
        keep: False: None in the place of what was put together, one tensor after the other.
    """
    if isinstance(value, Mapping):
        return type(value)((name, whole(each, keep)) for name, each in value.items())  # type: ignore[call-arg]
    if isinstance(value, list):
        return [whole(each, keep) for each in value]
    if not is_divided(value):
        return value
    together = value.full_tensor()
    return together.cpu() if keep else None


def is_divided(value: object) -> bool:
    """Whether it is a tensor of which this process has a part."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def divided_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, if `like` is divided."""
    if not is_divided(like) or is_divided(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    there: Any = like
    value = value.to(there.device)
    return distribute_tensor(value, there.device_mesh, there.placements, src_data_rank=None)
