"""The derivatives of PyTorch's own operators that are ours, and what each of them registers.

These operators stand at the end of a chain that PyTorch owns; `robustkern.install()` puts them there.  Each has a
kernel and a reference of the same signature, which `torch.ops.robustkern.<name>` and `robustkern.reference.<name>` are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkern import _library
from robustkern.ops._register import refuse_derivatives, register_fake, register_looped_vmap

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Derivative:
    """An operator robustkern::<name> with its reference."""

    name: str
    reference: Callable[..., Outputs]
    outputs: tuple[str, ...]

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.robustkern, self.name)


DERIVATIVES: dict[str, Derivative] = {}


def register_derivative(
    name: str,
    outputs: tuple[str, ...],
    fake: Callable[..., Outputs],
    reference: Callable[..., Outputs],
) -> None:
    """Makes robustkern::`name` an operator that every part of PyTorch understands, and lists it for the tests.

    Args:
        name: of the schema in csrc/ops.cpp.
        outputs: what its results are called in messages.
        fake: the results without computing them.
        reference: the same function in plain PyTorch.
    """
    DERIVATIVES[name] = Derivative(name, reference, outputs)
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


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The result for a gradient that is not needed."""
    return like.new_empty([0], dtype=dtype)
