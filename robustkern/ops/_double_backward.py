"""The second derivatives of PyTorch's own operators: what each registers, and samples of their arguments.

These operators stand at the end of a chain that PyTorch owns; `robustkern.install()` puts them there.  Each has a
kernel and a reference of the same signature, which `torch.ops.robustkern.<name>` and `robustkern.reference.<name>` are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustkern import _library
from robustkern.ops._register import refuse_derivatives, register_fake

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class DoubleBackwardSample:
    """One call of an operator."""

    name: str
    arguments: dict[str, Any]  # in the order of the schema; floating-point tensors in the dtype under test, or
    # in its accumulation type where the schema says so
    zero: tuple[int, ...] = ()  # outputs that are identically zero

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class DoubleBackward:
    """An operator robustkern::<name> with its reference."""

    name: str
    reference: Callable[..., Outputs]
    samples: Callable[[str, torch.dtype], Iterator[DoubleBackwardSample]]
    outputs: tuple[str, ...] = field(default=("gg_grad", "grad_x"))

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.robustkern, self.name)


DOUBLE_BACKWARDS: dict[str, DoubleBackward] = {}


def register_double_backward(
    name: str,
    outputs: tuple[str, ...],
    fake: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    samples: Callable[[str, torch.dtype], Iterator[DoubleBackwardSample]],
) -> None:
    """Makes robustkern::`name` an operator that every part of PyTorch understands, and lists it for the tests.

    Args:
        name: of the schema in csrc/ops.cpp.
        outputs: what its results are called in messages.
        fake: the results without computing them.
        reference: the same function in plain PyTorch.
        samples: calls that exercise every option, shape class and layout.
    """
    DOUBLE_BACKWARDS[name] = DoubleBackward(name, reference, samples, outputs)
    if _library.extension() is None:
        return
    register_fake(name)(fake)
    operator = getattr(torch.ops.robustkern, name)
    # Under install() a node of C++ differentiates it.  Without one it is a call that make_fx has recorded.
    refuse_derivatives(
        operator,
        "a recorded derivative cannot be differentiated, since make_fx detaches what a backward pass has saved; "
        "record the penalty and its gradients together, or differentiate the function itself",
    )
    register_looped_vmap(operator)


def register_looped_vmap(operator: Any) -> None:
    """Registers for `operator` the rule vmap(op)(x)[k] = op(x[k]), one call for each k."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def at(k: int) -> list[Any]:
            return [a.select(d, k) if isinstance(d, int) else a for a, d in zip(args, in_dims)]

        results = [operator(*at(k)) for k in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

    torch.library.register_vmap(operator.default, rule)


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The result for a gradient that is not needed."""
    return like.new_empty([0], dtype=dtype)
