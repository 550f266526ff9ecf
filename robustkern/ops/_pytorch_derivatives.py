"""Our derivatives of PyTorch's own operators, and what each of them registers.

These operators stand at the end of a chain that PyTorch owns; `robustkern.install()` puts them there.  Each has a
kernel and a reference of the same signature: `torch.ops.robustkern.<name>` and `robustkern.reference.<name>`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkern import _library
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._chains import refuse_derivatives
from robustkern.ops._register import register_fake, register_looped_vmap

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Derivative:
    """An operator and its reference, which has the same name."""

    reference: Function
    results: tuple[str, ...] = ()  # their names; by default gradients
    ends_chain: bool = True  # whether differentiating it is refused

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.robustkern, self.reference.__name__)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its results: of gradients, one for each need_<name> in the schema."""
        if self.results:
            return self.results
        arguments = [argument.name for argument in self.operator.default._schema.arguments]
        needs = [name.removeprefix("need_") for name in arguments if name.startswith("need_")]
        return tuple("gg_grad" if name == "grad" else f"grad_{name}" for name in needs)


DERIVATIVES: dict[str, Derivative] = {}


def register_derivative(reference: Function) -> Callable[[Function], None]:
    """Registers an operator with every part of PyTorch that must know it, and lists it for the tests.

    Decorates its fake, the function that returns its results without computing them.

    Args:
        reference: the same function in plain PyTorch, with the name from the schema in csrc/ops.cpp.
    """
    name = reference.__name__
    DERIVATIVES[name] = entry = Derivative(reference)

    def decorate(fake: Function) -> None:
        if _library.extension() is None:
            return
        register_fake(name)(fake)
        # Under install(), a C++ node differentiates it.  A call without that node was recorded by make_fx.
        refuse_derivatives(
            entry.operator.default,
            "a recorded derivative cannot be differentiated, since make_fx detaches what a backward pass has saved; "
            "record the penalty and its gradients together, or differentiate the function itself",
        )
        register_looped_vmap(entry.operator)

    return decorate


def nothing(like: Tensor) -> Tensor:
    """The result for a gradient that is not needed."""
    return like.new_empty([0])


def vector(like: Tensor, size: int, needed: bool) -> Tensor:
    """The result for a gradient of weight or bias: `size` sums, or none."""
    return like.new_empty([size if needed else 0], dtype=accumulation_dtype(like.dtype))
