"""Checks the options of attacks and losses by name: a name means the same everywhere."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkern._arguments import check_choice, check_integer, check_number, shown
from robustkern._choices import IMPLS, LAWS, NORMS


def check_options(options: Any, *, box: bool = False, **choices: tuple[str, ...]) -> None:
    """Checks every field; raises ValueError (TypeError for what must be callable) that names the class and the option.

    Numbers become floats; lists and arrays of numbers become tensors.

    Args:
        options: an attack or a loss, a dataclass.
        box: whether `eps` and `step_size` are lengths in [0, 1]^n: in the Linf norm, more than 1 makes no sense.
        **choices: for the name of a field, the texts that it may hold.
    """
    owner = type(options).__name__
    for field in dataclasses.fields(options):
        name, value = field.name, getattr(options, field.name)
        if name in choices or name in _CHOICES:
            check_choice(owner, name, value, choices.get(name, _CHOICES.get(name, ())))
        elif name in _CHECKS:
            object.__setattr__(options, name, _CHECKS[name](owner, name, value))
    if not box:
        return
    norm = getattr(options, "norm", "linf")
    for name in ("eps", "step_size"):
        value = getattr(options, name, None)
        if value is None:
            continue
        if norm != "linf" and isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{owner}: {name} must be one number for norm {norm!r}, got shape {list(value.shape)}")
        if norm == "linf" and bool((torch.as_tensor(value, device="cpu") > 1).any()):
            raise ValueError(
                f"{owner}: {name} must be at most 1, the side of the box [0, 1], got {shown(value)}; write 8/255 for 8 "
                "grey levels"
            )


def _magnitude(owner: str, name: str, value: Any, *, positive: bool = False) -> float | Tensor:
    """`value` as a float, or as a tensor if it is a tensor, list or array; finite, and >= 0, or > 0 if `positive`."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        if isinstance(value, Tensor):
            number: float | Tensor = value.detach()
        else:
            number = float(value) if isinstance(value, Real) else torch.from_numpy(np.array(value, dtype=np.float64))
        tensor = torch.as_tensor(number, device="cpu")  # not the default device, which may be "meta"
        sign = tensor > 0 if positive else tensor >= 0
        valid = tensor.dtype != torch.bool and tensor.numel() > 0 and bool((tensor.isfinite() & sign).all())
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: complex numbers
        valid = False
    if not valid:
        expected = "positive" if positive else "not negative"
        raise ValueError(f"{owner}: {name} must be finite and {expected}, a number or a tensor, got {shown(value)}")
    return number


def _flag(owner: str, name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{owner}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def _norm_order(owner: str, name: str, value: Any) -> float:
    try:
        order = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an integer too large for a float
        order = math.nan
    if not order >= 1.0:
        raise ValueError(f"{owner}: {name} must be 1, 2, inf or any number >= 1, got {shown(value)}")
    return order


def _projections(owner: str, name: str, value: Any) -> Any:
    exact = isinstance(value, str) and value == "exact"
    return value if exact else check_integer(owner, name, value, 1, 'or "exact"')


def _function(owner: str, name: str, value: object) -> object:
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be callable, got {type(value).__name__}")
    return value


_CHOICES: dict[str, tuple[str, ...]] = {"impl": IMPLS, "law": LAWS, "norm": NORMS}
_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    "eps": _magnitude,
    "step_size": lambda owner, name, value: None if value is None else _magnitude(owner, name, value, positive=True),
    "fraction": partial(check_number, least=0, most=1, open_below=True),
    "orientation": lambda owner, name, value: None if value is None else _function(owner, name, value),
    "projections": _projections,
    "p": _norm_order,
    **dict.fromkeys(("steps", "restarts", "coordinates", "every"), partial(check_integer, least=1)),
    **dict.fromkeys(("random_start", "targeted", "early_exit", "squared"), _flag),
    **dict.fromkeys(("weight", "ratio", "gamma", "noise"), partial(check_number, least=0)),
    **dict.fromkeys(("xi", "h", "temperature"), partial(check_number, least=0, open_below=True)),
    "label_smoothing": partial(check_number, least=0, most=1),
    **dict.fromkeys(("attack", "loss"), _function),
}
