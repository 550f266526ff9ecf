"""What every operator registers with PyTorch in the same way: its fake kernel and its vmap rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorates the fake of robustkern::`name`, the function that returns its results without computing them.

    PyTorch calls it even if only one of several tensors is on the meta device; no kernel then sees the call: hence the
    check.
    """
    operator = getattr(torch.ops.robustkern, name).default

    def decorate(function: Callable[..., Any]) -> None:
        def fake(*args: Any) -> Any:
            first: tuple[str, torch.device] | None = None
            for argument, value in zip(operator._schema.arguments, args):
                if isinstance(value, torch.Tensor):
                    first = first or (argument.name, value.device)
                    if value.device != first[1]:
                        raise RuntimeError(
                            f"{name}: {argument.name} must be on {first[1]} like {first[0]}, got {list(value.shape)} "
                            f"{str(value.dtype).removeprefix('torch.')} on {value.device}"
                        )
            return function(*args)

        torch.library.register_fake(f"robustkern::{name}", fake)

    return decorate


def register_row_vmap(op: Any, per_row: tuple[bool, ...]) -> None:
    """Registers for `op` the rule vmap(op)(x)[k] = op(x[k]), computed as one call on all rows.

    Args:
        op: the operator overload packet, such as torch.ops.robustkern.row_norm.
        per_row: for each argument, whether its first dimension counts rows; vmap must not map over the others.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        for index, (dim, rows) in enumerate(zip(in_dims, per_row)):
            if dim is not None and not rows:
                raise NotImplementedError(f"{op}: vmap over argument {index} is not supported")

        def fold(value: Any, dim: int | None, rows: bool) -> Any:
            if not rows or not isinstance(value, torch.Tensor):
                return value
            stacked = value.unsqueeze(0).expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return stacked.reshape(-1, *stacked.shape[2:])

        def unfold(value: torch.Tensor, rows: int) -> torch.Tensor:
            if value.dim() == 1 and value.numel() == 0 and rows:  # a derivative that is identically zero
                return value.expand(info.batch_size, 0)
            return value.reshape(info.batch_size, rows, *value.shape[1:])

        result = op(*(fold(a, d, r) for a, d, r in zip(args, in_dims, per_row)))
        first = next(i for i, rows in enumerate(per_row) if rows)
        shape = list(args[first].shape)
        mapped = in_dims[first]
        if mapped is not None:
            shape.pop(mapped)
        if isinstance(result, tuple):
            return tuple(unfold(r, shape[0]) for r in result), (0,) * len(result)
        return unfold(result, shape[0]), 0

    torch.library.register_vmap(op.default, rule)


def register_looped_vmap(operator: Any) -> None:
    """Registers for `operator` the rule vmap(op)(x)[k] = op(x[k]), one call for each k."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def at(k: int) -> list[Any]:
            return [a.select(d, k) if isinstance(d, int) else a for a, d in zip(args, in_dims)]

        results = [operator(*at(k)) for k in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

    torch.library.register_vmap(operator.default, rule)
