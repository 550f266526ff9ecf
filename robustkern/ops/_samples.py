"""Sample inputs of the operators: what the tests and `torch.library.opcheck` run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call op(*inputs, **options); derivatives are taken with respect to the first input."""

    op: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    empty: bool = False  # no elements: there is nothing to compare but shapes
    zero: tuple[str, ...] = ()  # which fields of `robustkern.testing.Derivatives` are identically zero
    orders: int = 2  # derivatives that the kernel has; those beyond are not asked for

    def __str__(self) -> str:
        return f"{self.op.__name__}({self.name})"

    def __call__(self, x: Tensor | None = None, **overrides: Any) -> Tensor:
        """Runs the call, with another first input or other options if given."""
        inputs = self.inputs if x is None else (x, *self.inputs[1:])
        return self.op(*inputs, **{**self.options, **overrides})


def make_tensor(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function from a shape to normally distributed values, the same ones for every dtype."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    return make
