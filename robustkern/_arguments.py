"""Checks of arguments: an error is one sentence with the function, the argument, what it must be and what was given."""

import math
import operator

import torch


def shown(value: object) -> str:
    """repr(value) on one line, cut to 100 characters: for messages."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # an integer of 5000 digits, or a class whose repr fails
        text = f"a {type(value).__name__} ({type(error).__name__})"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_integer(function: str, name: str, value: object, least: int, otherwise: str = "") -> int:
    """`value` as an int; ValueError unless it is a 64-bit integer of at least `least` (True and 2.0 are not integers).

    `otherwise`: what else the argument may be, for the message.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not least <= number < 2**63:
        expected = f"an integer of at least {least}" + (" and below 2^63" if number and number > least else "")
        expected += f" {otherwise}" if otherwise else ""
        raise ValueError(f"{function}: {name} must be {expected}, got {shown(value)}")
    return number


def check_number(
    function: str, name: str, value: object, least: float, most: float = math.inf, *, open_below: bool = False
) -> float:
    """`value` as a float; ValueError unless it is a finite number in [least, most] or, `open_below`, (least, most]."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not (least <= number <= most and math.isfinite(number)) or (open_below and number == least):
        interval = f"{'(' if open_below else '['}{least:g}, {most:g}{')' if math.isinf(most) else ']'}"
        raise ValueError(f"{function}: {name} must be a number in {interval}, got {shown(value)}")
    return number


def check_choice(function: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_generator(function: str, generator: object, device: torch.device, like: str = "outputs") -> None:
    """TypeError or ValueError unless `generator` is None or a torch.Generator on that kind of device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"{function}: generator must be on {device} like {like}, got {generator.device}")
