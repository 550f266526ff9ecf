"""Smooth activations in place of ReLU, whose input gradient is piecewise constant."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SMOOTH = {"gelu": nn.GELU, "silu": nn.SiLU}
_PIECEWISE_LINEAR = (nn.ReLU, nn.ReLU6)
_CALLED = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


def smooth_activations(model: nn.Module, activation: str) -> int:
    """Replaces every ReLU and ReLU6 module inside a model; returns how many.

    Args:
        model: Changed in place.
        activation: "gelu" or "silu".

    >>> from robustkern.models import smooth_activations
    >>> smooth_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "gelu")
    1
    """
    count = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _PIECEWISE_LINEAR):
                setattr(module, name, SMOOTH[activation]())
                count += 1
    return count


class CountReLUs(TorchDispatchMode):
    """Counts the calls of ReLU inside it, those of functions too, which no replacement of modules reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in _CALLED
        return func(*args, **(kwargs or {}))
