"""Sample calls of the operators, over which the tests and `torch.library.opcheck` run: one file for each operator.

The file of an operator in `robustkern.ops` has `samples`; that of an operator of PyTorch has `double_backward_samples`
and, if its first derivative or its forward mode is ours too, `backward_samples` or `jvp_samples`.  They cover every
option, shape class and layout.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
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
    orders: int = 2  # orders of derivatives that the kernel has; higher ones are not asked for

    def __str__(self) -> str:
        return f"{self.op.__name__}({self.name})"

    def __call__(self, x: Tensor | None = None, **overrides: Any) -> Tensor:
        """Runs the call, with another first input or other options if given."""
        inputs = self.inputs if x is None else (x, *self.inputs[1:])
        return self.op(*inputs, **{**self.options, **overrides})


@dataclass(frozen=True)
class DerivativeSample:
    """One call of a derivative of PyTorch's operator."""

    name: str
    arguments: dict[str, Any]  # in the order of the schema; floating-point tensors in the dtype under test, or
    # in its accumulation type where the schema says so
    zero: tuple[int, ...] = ()  # outputs that are identically zero

    def __str__(self) -> str:
        return self.name


def samples_of(schema: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    """The samples of an operator such as "row_norm", or of a derivative such as "group_norm_double_backward"."""
    stem = re.sub(r"(_double)?_backward$|_jvp$", "", schema)
    module = importlib.import_module(f"tests.samples.{stem}")
    samples: Iterator[Any] = getattr(module, f"{schema}_samples".removeprefix(f"{stem}_"))(device, dtype)
    return samples


def make_tensor(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function from a shape to normally distributed values, the same ones for every dtype."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    return make


def needs(names: tuple[str, ...], *needed: str) -> dict[str, bool]:
    """The arguments need_<name> of a schema, true for those `needed`."""
    return {f"need_{name}": name in needed for name in names}
