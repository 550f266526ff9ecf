"""Checks of what every attack and every loss is called with (a model, images, labels) and of the model's logits."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustkern._arguments import check_generator
from robustkern._dtypes import DTYPES
from robustkern.double_backward import fast_input_gradient


def check_call(name: str, model: object, x: Any, y: Any, generator: object = None, *, soft: bool = False) -> Tensor:
    """Checks a call and returns y, classes as int64.  Values are checked on the CPU only: reading them stalls a GPU.

    Args:
        name: the attack or loss, for messages.
        model: any callable.
        x: images.  [B, ...]
        y: classes, of any integer dtype.  [B]
        generator: None, or one on the device of x.
        soft: y may also be probabilities of the classes, floating point; they need not sum to one.

    Raises:
        TypeError: a wrong type, dtype or layout.
        ValueError: another shape or device, an x that is not finite, a negative class or probability.
    """
    if not callable(model):
        raise TypeError(f"{name}: model must be callable, got {type(model).__name__}")
    for argument, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name}: {argument} must be a dense tensor, got {value.layout}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be a floating-point tensor, got {x.dtype}; divide bytes by 255")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name}: x must be a batch [B, ...], got a scalar")
    probabilities = soft and y.dtype in DTYPES
    if not probabilities and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        expected = "integer classes or floating-point probabilities" if soft else "integer classes"
        raise TypeError(f"{name}: y must be {expected}, got {y.dtype}")
    if y.shape[:1] != x.shape[:1] or (y.dim() < 2 if probabilities else y.dim() != 1):
        shape = f"[{len(x)}, classes]" if probabilities else f"[{len(x)}]"
        raise ValueError(f"{name}: y must have shape {shape}, got {list(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{name}: y must be on {x.device} like x, got {y.device}")
    check_generator(name, generator, x.device, "x")
    # The sum is a cheap first test; since it may overflow, only the second test decides.
    if is_readable(x) and not math.isfinite(x.detach().sum().item()) and not bool(x.isfinite().all()):
        raise ValueError(f"{name}: x must be finite, got values that are NaN or infinite")
    y = y if probabilities else y.long()
    if y.numel() and is_readable(y):
        least, largest = (end.item() for end in torch.aminmax(y.detach()))
        if not probabilities:
            check_least(name, int(least))
        elif not 0.0 <= least <= largest < math.inf:
            raise ValueError(
                f"{name}: y must be classes or probabilities, finite and not negative, got {least:g} to {largest:g}"
            )
    return y


def warn_outside(name: str, x: Tensor) -> None:
    """Warns, once for each loss, of an x outside [0, 1], where a radius means something else.  On the CPU only."""
    if name in _warned or not is_readable(x) or not x.numel():
        return
    least, largest = (end.item() for end in torch.aminmax(x.detach()))
    if not 0 <= least <= largest <= 1:
        _warned.add(name)
        warnings.warn(
            f"{name}: x has values from {least:g} to {largest:g}, and eps is in units of x: of images normalised "
            "outside the model it is not the published radius (normalise inside, images in [0, 1])",
            stacklevel=4,
        )


_warned: set[str] = set()


def check_least(name: str, least: int) -> None:
    """Raises ValueError if the least class is negative."""
    if least < 0:
        raise ValueError(f"{name}: y must be classes from 0 on, got {least}")


def is_readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read without waiting for a device, a compiler or a transform."""
    if torch.compiler.is_compiling() or torch._C._functorch.get_interpreter_stack():
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def logits_of(name: str, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """model(x); raises unless it is logits [B, C] with C >= 2 and every y is one of the C classes."""
    logits = model(x)
    classes = None if y.is_floating_point() or not len(y) or not is_readable(y) else int(y.max())
    check_logits(name, logits, len(x), classes)
    if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
        raise ValueError(_independent(name))
    if y.is_floating_point() and y.shape != logits.shape:
        raise ValueError(
            f"{name}: y must be probabilities of shape {list(logits.shape)} like the logits, got {list(y.shape)}"
        )
    return logits


def check_logits(name: str, logits: Any, count: int, largest: int | None = None) -> None:
    """Raises unless `logits` are [count, C] with C >= 2 and C greater than the largest class."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: model must give logits [{count}, classes], got {got}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: model must give floating-point logits, got {logits.dtype}")
    if logits.shape[1] < 2:
        raise ValueError(f"{name}: model must give a logit for each of two classes or more, got {logits.shape[1]}")
    if largest is not None:
        check_largest(name, largest, logits.shape[1])


def check_largest(name: str, largest: int, classes: int) -> None:
    """Raises ValueError if the largest class is none of so many."""
    if largest >= classes:
        raise ValueError(f"{name}: y must be classes from 0 to {classes - 1}, got {largest}")


def gradient_of(name: str, values: Tensor, x: Tensor) -> Tensor:
    """d sum(values) / d x, without history.

    Raises:
        ValueError: The values have no graph that leads to x.
    """
    if not values.requires_grad:
        raise ValueError(_independent(name))
    with fast_input_gradient():
        grad: Tensor | None = torch.autograd.grad(values, x, torch.ones_like(values), allow_unused=True)[0]
    if grad is None:
        raise ValueError(_independent(name))
    return grad


def _independent(name: str) -> str:
    return (
        f"{name}: model must be differentiable in x, got logits that do not depend on it: called under "
        "torch.no_grad(), or detached"
    )
