"""The chart of penalised training steps, drawn from a results file."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

Columns = dict[str, dict[str, Any]]  # provider -> row

FLOOR = 2.0  # six passes over the layers where a plain step makes three
_BARS = {
    "eager": ("stock eager", "#9aa5b1"),
    "compile": ("torch.compile of the whole step", "#c9b18a"),
    "finite_differences": ("finite differences (inexact)", "#d9d2c5"),
    "installed": ("robustkern.install()", "#1f6f8b"),
    "installed_compile": ("torch.compile with robustkern installed", "#7fb7be"),
}
_LONGEST = 8.0  # longer bars are cut; their label says how long they are


def digest(groups: dict[Any, Columns]) -> str:
    """A hash of what the chart shows, stored in the picture, so that a stale picture can be recognised."""
    shown = [
        [list(key), [[provider, columns[provider].get("ratio")] for provider in _BARS if provider in columns]]
        for key, columns in groups.items()
    ]
    return hashlib.sha256(json.dumps([shown, _BARS, _LONGEST, _PLATE]).encode()).hexdigest()[:16]


def is_current(path: Path, groups: dict[Any, Columns]) -> bool:
    """Whether the picture was drawn from these figures."""
    if not path.exists():
        return False
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Comment") == digest(groups)


_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}  # keeps a number off the floor's line


_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}  # keeps a number off the floor's line


def draw(groups: dict[Any, Columns], title: str) -> bytes:
    """A PNG: for each model one horizontal bar per provider, as multiples of the plain step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[tuple[float, str, float]] = []  # position, provider, ratio
    ticks: list[tuple[float, str]] = []
    position = 0.0
    for (model, penalty), columns in groups.items():
        bars = [(p, columns[p]["ratio"]) for p in _BARS if p in columns and columns[p].get("ratio")]
        if not bars:
            continue
        ticks.append((position + (len(bars) - 1) / 2, _label(model, penalty)))
        for provider, ratio in bars:
            rows.append((position, provider, ratio))
            position += 1
        position += 0.9
    figure, axes = pyplot.subplots(figsize=(10, 1.4 + 0.165 * position), layout="constrained")
    labelled: set[str] = set()
    for at, provider, ratio in rows:
        name, colour = _BARS[provider]
        axes.barh(at, min(ratio, _LONGEST), 0.92, color=colour, label=None if provider in labelled else name)
        labelled.add(provider)
        cut = " →" if ratio > _LONGEST else ""
        weight = "bold" if provider == "installed" else "normal"
        axes.text(
            min(ratio, _LONGEST) + 0.05, at, f"{ratio:.2f}{cut}", va="center", fontsize=7, weight=weight, bbox=_PLATE
        )
    axes.axvline(FLOOR, color="#b03a2e", linewidth=1.2, linestyle="--")
    axes.text(FLOOR, -1.05, "twice the plain step", color="#b03a2e", fontsize=8, ha="center", va="bottom")
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(position - 0.9, 1), -1.1)
    longest = max((ratio for _, _, ratio in rows), default=FLOOR)
    axes.set_xlim(0, min(longest, _LONGEST) + 0.4)
    axes.set_xlabel("time of a step with a gradient penalty, as a multiple of the plain step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    figure.supxlabel(title, fontsize=6.5, color="#666666")
    buffer = BytesIO()
    # Software is matplotlib's version by default: the picture would change with it alone.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Comment": digest(groups), "Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _label(model: str, penalty: str) -> str:
    """A label in two lines: the network, then batch, layout and penalty."""
    name, _, rest = model.partition(", ")
    if rest and not rest[0].isdigit():  # "PreAct-ResNet-18, BatchNorm, 48x..."
        norm, _, rest = rest.partition(", ")
        name = f"{name}, {norm}"
    return f"{name}\n{rest}, {penalty}"
