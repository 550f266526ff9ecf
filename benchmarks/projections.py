"""The table and the picture of Jacobian penalties, from a results file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from .bench_jacobian import OURS, PLAIN, RECIPE, ROWS, VMAP

Row = dict[str, Any]
Columns = dict[str, Row]  # provider -> row

_COLOURS = {"orthonormal": "#1f6f8b", "sphere": "#b03a2e", "gaussian": "#c9b18a", "rademacher": "#9aa5b1"}


def cases(section: Row) -> dict[tuple[str, int | str], Columns]:
    """The columns of each model and number of projections."""
    found: dict[tuple[str, int | str], Columns] = {}
    for row in section["rows"]:
        found.setdefault((row["model"], row["projections"]), {})[row["provider"]] = row
    return found


def deviation(section: Row, model: str, law: str, projections: int | str, figure: str = "measured") -> float:
    """The relative standard deviation of one sample's estimate."""
    if projections == "exact":
        return 0.0
    wanted = (model, law, projections)
    return next(r[figure] for r in section["variances"] if (r["model"], r["law"], r["projections"]) == wanted)


def as_precise(section: Row, model: str, projections: int | str) -> float | None:
    """Plain steps that the recipe needs for the variance of our estimate, by more projections or by every row.

    Linear in K between the measured numbers, since each further autograd.grad costs the same.
    """
    columns = cases(section)
    wanted = deviation(section, model, "orthonormal", projections, "predicted")
    rows = columns[model, "exact"].get(ROWS, {}).get("ratio")
    if wanted == 0:
        return rows
    recipe = columns[model, projections].get(RECIPE, {}).get("ratio")
    if recipe is None:
        return rows
    count = (deviation(section, model, "sphere", 1, "predicted") / wanted) ** 2
    needed = 1 + (recipe - 1) * count / int(projections)
    return needed if rows is None else min(needed, rows)


def table_lines(section: Row) -> Iterator[list[str]]:
    """One line for each model and number of projections."""
    for (model, projections), columns in cases(section).items():
        rival = columns.get(ROWS if projections == "exact" else RECIPE)
        plain = columns.get(PLAIN)
        sigma = deviation(section, model, "orthonormal", projections)
        rivals = 0.0 if projections == "exact" else deviation(section, model, "sphere", projections)
        yield [
            f"{model}, {'exact' if projections == 'exact' else f'K = {projections}'}",
            "-" if projections == "exact" else str(1 + int(projections)),
            _times(columns.get(OURS)),
            _times(rival),
            _times(columns.get(VMAP)),
            _memory(columns.get(OURS), plain),
            _memory(rival, plain),
            _memory(columns.get(VMAP), plain),
            f"{sigma:.0%}",
            f"{rivals:.0%}",
            _number(as_precise(section, model, projections)),
        ]


HEADER = [
    "", "1 + K", "robustkern", "published recipe (exact: rows by loop)", "vmap(vjp)", "peak memory: robustkern",
    "recipe", "vmap", "deviation: robustkern", "recipe", "recipe, as precise",
]  # fmt: skip


def _times(row: Row | None) -> str:
    return "-" if row is None else "failed" if row["ms"] is None else f"{row['ratio']:.2f}x"


def _memory(row: Row | None, plain: Row | None) -> str:
    if row is None or plain is None or not row.get("peak_bytes"):
        return "-"
    return f"{row['peak_bytes'] / plain['peak_bytes']:.2f}x"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def reasons(section: Row) -> list[str]:
    """Why some figures are missing, once each."""
    missing = {
        f"- {row['provider']}, {row['model']}: {row['reason']}": None for row in section["rows"] if not row["ms"]
    }
    return list(missing)


def cost(section: Row, model: str, provider: str, count: float) -> float:
    """The time of a step with K projections in plain steps, between and beyond the measured numbers."""
    measured = sorted(
        (k, c[provider]["ratio"])
        for (m, k), c in cases(section).items()
        if m == model and k != "exact" and c.get(provider, {}).get("ratio")
    )
    for (k0, t0), (k1, t1) in zip(measured, measured[1:]):  # noqa: RUF007
        if count <= k1 or k1 == measured[-1][0]:
            return t0 + (t1 - t0) * (count - k0) / (k1 - k0)
    raise ValueError(f"{model}, {provider}: fewer than two numbers of projections were measured")


def digest(section: Row) -> str:
    """A hash of what the picture shows, stored in it, so that a stale picture can be recognised."""
    shown = [[r["model"], r["projections"], r["provider"], r.get("ratio")] for r in section["rows"]]
    return hashlib.sha256(json.dumps([shown, section["variances"], _COLOURS]).encode()).hexdigest()[:16]


def is_current(path: Path, section: Row) -> bool:
    """Whether the picture was drawn from these figures."""
    if not path.exists():
        return False
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Comment") == digest(section)


def draw(section: Row, title: str) -> bytes:
    """A PNG: for each model the deviation of an estimate over the cost of a step, measured and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(model for model, _ in cases(section)))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.1), layout="constrained", squeeze=False, sharey=True
    )
    for axes, model in zip(panels[0], models):
        for law, colour in _COLOURS.items():
            rows = [row for row in section["variances"] if row["model"] == model and row["law"] == law]
            costs = [cost(section, model, OURS, row["projections"]) for row in rows]
            axes.plot(costs, [row["predicted"] for row in rows], color=colour, linewidth=1.2)
            axes.plot(costs, [row["measured"] for row in rows], "o", color=colour, markersize=4, label=law)
        sphere = [row for row in section["variances"] if row["model"] == model and row["law"] == "sphere"]
        costs = [cost(section, model, RECIPE, row["projections"]) for row in sphere]
        axes.plot(
            costs, [row["measured"] for row in sphere], "x--", color="#555555", markersize=5, linewidth=0.9,
            label="published recipe: sphere, stock PyTorch",
        )  # fmt: skip
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("time of a step, as a multiple of the plain step")
        axes.set_xlim(left=1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylim(bottom=0)  # of both, after both are drawn
    panels[0][0].set_ylabel("standard deviation of one sample's\nestimate of ‖J‖², relative to it")
    panels[0][0].legend(frameon=False, fontsize=8, title="dots: measured, lines: predicted", title_fontsize=8)
    figure.supxlabel(title, fontsize=6.5, color="#666666")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Comment": digest(section), "Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
