"""The tables: each kernel's own bound, and the time of each call at its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from . import machine
from .model import Prediction, Reading

_STEM = re.compile(r"rk4cuda\d+([a-z0-9_]+?)(?:_kernel)?(?:I|E|v|$)")


def stem(mangled: str) -> str:
    """The kernel's name without namespace and arguments."""
    found = re.search(r"cuda(\d+)", mangled)
    if not found:
        return mangled
    name = mangled[found.end() : found.end() + int(found[1])]
    return name.removesuffix("_kernel")


def widths(reading: Reading) -> str:
    """Loads and stores by their width in bits, for one pass."""

    def one(counter: dict[int, float]) -> str:
        return " ".join(f"{count:g}x{width}" for width, count in sorted(counter.items(), reverse=True))

    loads = sum((c.loads for c in reading.counts), start=type(reading.counts[0].loads)())
    stores = sum((c.stores for c in reading.counts), start=type(reading.counts[0].loads)())
    return f"{one(loads)} / {one(stores) or '-'}"


def row_of(reading: Reading) -> dict[str, Any]:
    counts = reading.counts
    return {
        "case": reading.case.name,
        "kernel": stem(reading.code.name),
        "loads / stores": widths(reading),
        "instructions / 16 B": round(reading.instructions_a_vector, 1),
        "registers": reading.code.registers,
        "warps": reading.resident * reading.warps,
        "barriers": sum(c.barriers for c in counts),
        "divisions": sum(c.divisions for c in counts),
        "local": reading.code.spilled + sum(c.local for c in counts),
        "KB in flight": round(reading.in_flight / 1000),
        "bound": reading.bound,
        "share": round(100 * reading.share),
        "floor": reading.stated.floor,
        "verdict": "holds" if reading.share >= 0.85 else "floor" if reading.stated.floor else "FAILS",
    }


def call_row(prediction: Prediction) -> dict[str, Any]:
    return {
        "case": prediction.case.name,
        "launches": len(prediction.readings) + prediction.small,
        "copy us": round(prediction.copy_seconds * 1e6, 1),
        "predicted us": round(prediction.seconds * 1e6, 1),
        "MB from L2": round(prediction.held / 1e6),
        "share": round(100 * prediction.share),
    }


def plain(rows: Iterable[dict[str, Any]]) -> str:
    """Columns for a terminal."""
    lines = list(rows)
    if not lines:
        return ""
    names = [name for name in lines[0] if any(line[name] not in ("", None) for line in lines)]
    size = {name: max(len(name), *(len(str(line[name])) for line in lines)) for name in names}
    numeric = {name for name in names if all(isinstance(line[name], (int, float)) for line in lines)}
    place = {name: (str.rjust if name in numeric else str.ljust) for name in names}
    out = ["  ".join(place[name](name, size[name]) for name in names)]
    out += ["  ".join(place[name](str(line[name]), size[name]) for name in names) for line in lines]
    return "\n".join(line.rstrip() for line in out)


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    lines = list(rows)
    names = [name for name in lines[0] if any(line[name] not in ("", None) for line in lines)]
    out = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    out += ["| " + " | ".join(str(line[name]) for name in names) + " |" for line in lines]
    return "\n".join(out)


def in_words() -> str:
    return f"Little's law asks for {machine.IN_FLIGHT / 1000:.0f} KB in flight on each SM."
