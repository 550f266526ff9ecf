"""The tables: each kernel's own bound, and the time of each call at its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from . import machine, model, products
from .model import TARGET, Prediction, Reading
from .toolchain import ROOT

PAGE = ROOT / "docs" / "cuda-budget.md"


def stem(mangled: str) -> str:
    """The kernel's name without namespace and arguments."""
    found = re.search(r"cuda(\d+)", mangled)
    if not found:
        return mangled
    name = mangled[found.end() : found.end() + int(found[1])]
    return name.removesuffix("_kernel")


def widths(reading: Reading) -> str:
    """Loads and stores by their width in bits, for one pass."""

    def one(counters: list[dict[int, float]]) -> str:
        total = {width: sum(counter.get(width, 0) for counter in counters) for counter in counters for width in counter}
        return " ".join(f"{total[width]:.3g}x{width}" for width in sorted(total, reverse=True)) or "-"

    return f"{one([c.loads for c in reading.counts])} / {one([c.stores for c in reading.counts])}"


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
        "floor": f"{reading.stated.floor} ({100 * reading.most:.0f}%)" if reading.most < 1 else "",
        "verdict": "holds" if reading.share >= TARGET else "floor" if reading.passed else "FAILS",
    }


def rows_of(prediction: Prediction) -> list[dict[str, Any]]:
    """One for each kernel, of its launches the slowest."""
    slowest: dict[str, Reading] = {}
    for reading in prediction.readings:
        known = slowest.setdefault(reading.code.name, reading)
        if reading.share < known.share:
            slowest[reading.code.name] = reading
    return [row_of(reading) for reading in slowest.values()]


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


def page(rows: list[dict[str, Any]], calls: list[dict[str, Any]], multiplied: list[dict[str, Any]]) -> str:
    """docs/cuda-budget.md."""

    def as_list(text: str | None) -> str:
        return re.sub(r"^    (\S.*?)  +", r"* **\1**: ", text or "", flags=re.M)

    bounds = as_list(model.__doc__)
    failing = sum(row["verdict"] == "FAILS" for row in rows)
    return f"""# The CUDA kernels' budget

Written by `python -m benchmarks.cuda_budget --write`.  **No figure here was measured**: nvcc compiled the kernels for
sm_90, and the shares are what a model says of their machine code on an H200.  `make cuda-budget` fails where a kernel's
own bound is below {TARGET:.0%} of a copy, or of what the formula's instructions allow where a case counts them: now
{failing} of {len(rows)}.

## The model
{bounds}
{in_words()}

Assumed: {machine.BANDWIDTH / 1e12:g} TB/s, {machine.CLOCK / 1e9:g} GHz, {machine.ISSUE:g} instructions issued a
scheduler and cycle, {machine.MEMORY_LATENCY / machine.CLOCK * 1e9:.0f} ns from memory and {machine.L2_LATENCY} cycles
from L2, {machine.L2_BANDWIDTH / 1e12:g} TB/s from L2, of which {machine.L2 // 2**20} MiB hold what was touched last.
A second kernel that goes over tensors again finds them there if they fit; if not, it finds that much if it begins at
the end where the first one left off, and nothing otherwise.  The way through a kernel is that of a large, aligned call
with the case's own arguments: which tensors are absent is read from the launch.

## Kernels: own bound
Loads and stores of one pass of a thread, by width in bits; instructions for each 16 bytes from or to device memory;
warps that an SM holds; divisions, which are reciprocals on the way; bytes that an SM has under way.

{markdown(rows)}

## Calls: prediction at the shape
The copy moves the fewest bytes that the operation must move.

{markdown(calls)}

## Kernels of matrix products
{as_list(products.__doc__)}
HMMA instructions, instructions and wavefronts of a warp's step; what the tile takes is spread over its steps.

{markdown(multiplied)}
"""
