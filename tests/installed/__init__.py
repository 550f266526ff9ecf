"""Functions of replaced operators, over which every test of `robustkern.install()` runs: one file for each operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One function that PyTorch differentiates twice with replaced operators."""

    name: str
    function: Callable[..., Tensor]  # of the inputs, twice differentiable in all of them
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]  # fresh, detached; all require grad when used
    # The same function in operators whose second derivative PyTorch has, if it lacks that of `function`'s operator.
    stock: Callable[..., Tensor] | None = None
    # The same, if PyTorch gets the third derivative of `function`'s operator wrong.
    third: Callable[..., Tensor] | None = None
    half: bool = True  # also in float16 and bfloat16
    crashes: bool = False  # whether PyTorch itself crashes in some of the gradients

    def __str__(self) -> str:
        return self.name


def images(
    *shape: int, affine: bool = True, layout: torch.memory_format = torch.contiguous_format
) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """A batch of images, with the weight and bias of every channel if affine."""

    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
        weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64).to(dtype)
        return (x, 1.5 + weight, bias) if affine else (x,)

    return make
