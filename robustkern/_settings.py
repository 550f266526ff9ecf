"""Settings: fields of a dataclass, each declared once with its type, its default and its range.

The docstring of the class describes each setting; the first sentence is its help text on the command line.
"""

import dataclasses
import inspect
import math
import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from robustkern._arguments import shown


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take: integers or any real numbers, between two ends.

    Attributes:
        least: The smallest one.
        most: The largest one.
        integer: Whether it must be an integer.
        open: Which ends are excluded: "", "(", ")" or "()".
        unit: The unit, for messages.
    """

    least: float
    most: float = math.inf
    integer: bool = False
    open: str = ")"
    unit: str = ""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.integer else Real):
            return False
        number: Any = value  # mypy cannot compare Reals
        ends = [end for end, mark in ((self.least, "("), (self.most, ")")) if mark in self.open]
        return self.least <= number <= self.most and number not in ends

    def __str__(self) -> str:
        if self.integer:
            return f"an integer from {self.least} to {self.most}{self.unit}"
        before, after = "(" if "(" in self.open else "[", ")" if ")" in self.open else "]"
        return f"a number in {before}{self.least:g}, {self.most:g}{after}{self.unit}"


def counts(least: int = 1, most: int = 2**31 - 1) -> Range:
    """The integers from `least` to `most`."""
    return Range(least, most, integer=True, open="")


SEEDS = counts(0, 2**63 - 1)
THREADS = counts(1, 1024)
RADII = Range(0, 1, open="(", unit=" in units of images in [0, 1], such as 8/255")


def setting(
    default: Any = dataclasses.MISSING, valid: Range | None = None, *, panel: str | None = None, flags: str = ""
) -> Any:
    """A field of a dataclass.

    Args:
        default: Its default, if it has one.
        valid: The numbers that it may take.
        panel: The heading under which `--help` lists it.
        flags: Its option on the command line, if not its own name: "--norm -p".
    """
    return dataclasses.field(default=default, metadata={"valid": valid, "panel": panel, "flags": tuple(flags.split())})


def check_ranges(settings: Any, error: type[Exception]) -> None:
    """Raises `error` unless every number of a dataclass is in its range."""
    for field in dataclasses.fields(settings):
        valid, value = field.metadata.get("valid"), getattr(settings, field.name)
        if valid is not None and value not in valid:
            raise error(f"{field.name} must be {valid}, got {shown(value)}")


def summaries(kind: type) -> dict[str, str]:
    """The first sentence about each attribute in the docstring of a class."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    texts = {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.M)}
    return {name: re.sub('["`]', "", text.partition(". ")[0].rstrip(".")) + "." for name, text in texts.items()}
