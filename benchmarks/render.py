"""Writes the tables of docs/benchmarks.md, README.md and results/<device>.md, and the charts, from results/*.json.

    python -m benchmarks.render [--check]

A table stands between <!-- benchmarks:begin NAME --> and <!-- benchmarks:end NAME -->.  No figure is typed by hand, and
no row is left out because it is a loss.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import attack_tables, bench_precision, chart, harness, projections, robustness
from .markdown import sentence, table, times
from .op_cases import ORDERS
from .op_cases import PROVIDERS as OP_PROVIDERS

TRAINING = harness.ROOT / "docs" / "training.json"
Row = dict[str, Any]
Columns = dict[str, Row]  # provider -> row

_TITLES = {
    "eager": "stock eager", "compile": "torch.compile", "reference": "reference", "robustkern": "robustkern",
    "operator": "bare kernel", "plain": "plain step", "plain_installed": "plain step, installed",
    "installed": "robustkern installed", "installed_compile": "torch.compile, installed",
    "installed_save_memory": "installed, save_memory", "forward_over_reverse": "forward over reverse",
    "jax": "JAX, jitted",
    "finite_differences": "finite differences", "installed_graph": "robustkern installed, one CUDA graph",
}  # fmt: skip
# The case of each operator that stands for it in docs/benchmarks.md.
_REPRESENTATIVE = {
    "row_norm": ("float32", "p=2"),
    "softmax_cross_entropy": ("float32", "1000 classes"),
    "kl_divergence": ("float32", "1000 classes"),
}


def stands_for(op: str, dtype: str, case: str) -> bool:
    """Whether this is the case that stands for its operator."""
    if op not in _REPRESENTATIVE:
        raise SystemExit(f"no case stands for {op}: add its dtype and case to _REPRESENTATIVE in benchmarks/render.py")
    return (dtype, case) == _REPRESENTATIVE[op]


def case_name(row: Row) -> str:
    """What tells one case of an operator from another."""
    classes = "" if row["op"] == "row_norm" else f"{row['shape'][1]} classes"
    return ", ".join(filter(None, (classes, row["case"])))


def group(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, Columns]:
    """Rows that differ in their provider only, side by side."""
    groups: dict[Any, Columns] = {}
    for row in rows:
        groups.setdefault(key(row), {})[row["provider"]] = row
    return groups


def op_groups(results: Row) -> dict[Any, Columns]:
    sizes = ("large", "small", "tiny")
    rows = sorted(results.get("ops", {}).get("rows", []), key=lambda r: (r["op"], sizes.index(r["size"])))
    return group(
        rows,
        lambda r: (r["op"], r["size"], r["dtype"], tuple(r["shape"]), case_name(r), r["order"]),
    )


def step_groups(results: Row) -> dict[Any, Columns]:
    return group(results.get("steps", {}).get("rows", []), lambda r: (r["model"], r["penalty"]))


def ms(row: Row | None) -> str:
    if row is None or row.get("reason") == harness.TOO_LATE_TO_COMPILE:
        return "-"
    return "failed" if row["ms"] is None else f"{row['ms']:.3g}"


def speed_up(columns: Columns, over: str, of: str = "robustkern") -> float | None:
    mine, theirs = columns.get(of), columns.get(over)
    return theirs["ms"] / mine["ms"] if mine and theirs and mine["ms"] and theirs["ms"] else None


def megabytes(row: Row | None) -> str:
    return "-" if row is None or not row.get("peak_bytes") else f"{row['peak_bytes'] / 1e6:.3g}"


def ops_table(results: Row) -> str:
    """One line per operator and order at one size above cache, then the worst case of all."""
    groups = {key: c for key, c in op_groups(results).items() if key[1] == "large"}
    header = [
        "",
        "stock eager, ms",
        "torch.compile, ms",
        "robustkern, ms",
        "faster than eager",
        "than compile",
        "bare kernel, GB/s",
        "of copy",
    ]

    def line(name: str, c: Columns) -> list[str]:
        kernel = c.get("operator")
        figures = (
            ["-", "-"] if not kernel or not kernel["ms"] else [f"{kernel['gb_per_s']:.3g}", f"{kernel['of_copy']:.0%}"]
        )
        cells = [ms(c.get(p)) for p in ("eager", "compile", "robustkern")]
        return [name, *cells, times(speed_up(c, "eager")), times(speed_up(c, "compile")), *figures]

    lines = []
    for (op, _, dtype, _, case, order), columns in groups.items():
        if stands_for(op, dtype, case):
            lines.append(line(f"{op}, {order.replace('_', ' ')}", columns))
    gains = {key: gain for key, c in groups.items() if (gain := speed_up(c, "eager")) is not None}
    if gains:
        op, _, dtype, _, case, order = key = min(gains, key=gains.__getitem__)
        lines.append(line(f"worst of {len(gains)}: {op}, {order.replace('_', ' ')}, {dtype}, {case}", groups[key]))
    shapes = {k[0]: f"{k[0]} {'x'.join(map(str, k[3]))} {k[2]} {k[4]}" for k in groups if stands_for(k[0], k[2], k[4])}
    return f"{sentence(results['ops'])} {'; '.join(shapes.values())}.\n\n{table(header, lines)}"


def steps_table(results: Row) -> str:
    """Penalised steps as multiples of the plain step: time, then peak memory."""
    timed = (
        "eager", "forward_over_reverse", "compile", "jax", "finite_differences", "installed", "installed_save_memory",
        "installed_compile", "plain_installed",
    )  # fmt: skip
    measured = ("eager", "finite_differences", "installed", "installed_save_memory")
    found = {provider for c in step_groups(results).values() for provider in c}
    timed, measured = (tuple(p for p in chosen if p in found) for chosen in (timed, measured))
    peak_titles = [f"peak memory: {_TITLES[p]}" if p == measured[0] else _TITLES[p] for p in measured]
    header = ["", f"{_TITLES['plain']}, ms", *(_TITLES[p] for p in timed), *peak_titles]
    lines = []
    for (model, penalty), c in step_groups(results).items():
        peaks = [times(ratio_of(c.get(p), c.get("plain"), "peak_bytes")) for p in measured]
        lines.append([f"{model}, {penalty}", ms(c.get("plain")), *(step_ratio(c.get(p)) for p in timed), *peaks])
    return f"{sentence(results['steps'])}\n\n{table(header, lines)}"


def step_ratio(row: Row | None) -> str:
    if row is None or not row.get("ratio"):
        return ms(row)
    if len(row.get("ratios", ())) > 1:
        return f"{interval(row['ratios'])}{first_call(row)}"
    digits = 3 if row["provider"] == "plain_installed" else 2
    return f"{row['ratio']:.{digits}f}x{first_call(row)}"


def interval(ratios: list[float]) -> str:
    """The median and the range of all runs, with one digit more than they have in common, and at least two."""
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    digits = 2 if high - low >= 0.01 else 3
    return f"{middle:.{digits}f}x ({low:.{digits}f} to {high:.{digits}f})"


def first_call(row: Row) -> str:
    first = f" after {row['first_call_s']:.0f} s" if "first_call_s" in row else ""
    return first


def ratio_of(row: Row | None, other: Row | None, what: str) -> float | None:
    return row[what] / other[what] if row and other and row.get(what) and other.get(what) else None


def training_table(rows: list[Row]) -> str:
    """Accuracies of trained networks, as their run directories state them."""
    lines = [
        [
            r["data"],
            r["method"],
            f"{r['eps']:g}",
            str(r["epochs"]),
            f"{r['clean_accuracy']:.1%}",
            f"{r['robust_accuracy']:.1%}",
            str(r["attacked_images"]),
            f"`{r['command']}`",
        ]
        for r in rows
    ]
    return table(["data", "method", "eps (Linf)", "epochs", "clean", "PGD-20", "images attacked", "command"], lines)


def full(results: Row) -> str:
    """Everything of one device."""
    parts = [
        "# " + next(iter(results.values()))["stamp"]["device"],
        "",
        "Rendered by `python -m benchmarks.render`; see ../README.md.",
    ]
    if "ops" in results:
        header = [
            "case",
            "order",
            *(f"{_TITLES[p]}, ms" for p in OP_PROVIDERS),
            "over eager",
            "over compile",
            "over reference",
            "GB/s",
            "of copy",
        ]
        lines = []
        for (op, size, dtype, shape, case, order), c in op_groups(results).items():
            kernel = c.get("operator") or {}
            gains = [times(speed_up(c, p)) for p in ("eager", "compile", "reference")]
            rate = [f"{kernel['gb_per_s']:.3g}", f"{kernel['of_copy']:.0%}"] if kernel.get("ms") else ["-", "-"]
            name = f"{op}, {'x'.join(map(str, shape))} {dtype}, {case} ({size})"
            lines.append([name, order.replace("_", " "), *(ms(c.get(p)) for p in OP_PROVIDERS), *gains, *rate])
        parts += [
            "",
            "## Operators",
            "",
            sentence(results["ops"]),
            "",
            table(header, lines),
            *_reasons(op_groups(results), ORDERS),
        ]
    if "steps" in results:
        header = ["case", "", "ms", "quartiles", "of plain", "peak MB", "gradient error", "first call, s"]
        lines = []
        for (model, penalty), c in step_groups(results).items():
            for provider, row in c.items():
                quartiles = "-" if row["ms"] is None else " ".join(f"{q:.3g}" for q in row["quartiles"])
                error = "-" if row["ms"] is None else f"{row['gradient_error']:.1e}"
                first = f"{row['first_call_s']:.3g}" if "first_call_s" in row else ""
                lines.append(
                    [
                        f"{model}, {penalty}",
                        _TITLES[provider],
                        ms(row),
                        quartiles,
                        step_ratio({k: v for k, v in row.items() if k != "first_call_s"}) if row.get("ratio") else "-",
                        megabytes(row),
                        error,
                        first,
                    ]
                )
        parts += [
            "",
            "## Training steps",
            "",
            sentence(results["steps"]),
            "",
            table(header, lines),
            *_reasons(step_groups(results), ()),
        ]
    for name, render in (*BLOCKS, ("attention", attention)):
        if name in results and name not in ("ops", "steps"):
            parts += ["", f"## {_SECTIONS[name]}", "", render(results)]
    return "\n".join(parts) + "\n"


def double_backward_table(results: Row) -> str:
    """One line for each second backward, stock beside installed."""
    section = results["double_backward"]
    header = ["second backward of", "stock, ms", "installed, ms", "faster", "GB/s", "of copy"]
    lines = [
        [
            row["case"],
            "raises" if row["stock_ms"] is None else f"{row['stock_ms']:.3g}",
            f"{row['installed_ms']:.3g}",
            "-" if row["stock_ms"] is None else times(row["stock_ms"] / row["installed_ms"]),
            f"{row['gb_per_s']:.3g}",
            f"{row['of_copy']:.0%}",
        ]
        for row in section["rows"]
    ]
    return f"{sentence(section)}\n\n{table(header, lines)}"


def jacobian_table(results: Row) -> str:
    """Steps with a Jacobian penalty: time, memory and variance of ours and of its rivals."""
    section = results["jacobian"]
    lines = list(projections.table_lines(section))
    return "\n\n".join(
        filter(None, (sentence(section), table(projections.HEADER, lines), "\n".join(projections.reasons(section))))
    )


def attention(results: Row) -> str:
    """Attention differentiated twice: time, memory and error of ours, PyTorch's MATH backend and JAX, by length."""
    section = results["attention"]
    ms = "ms of processor time" if section["stamp"]["clock"] == "process" else "ms"
    header = ["", ms, "quartiles", "peak memory of a head, MB", "relative error"]
    lines = [
        [
            f"{row['keys']} keys, {row['dtype']}, {row['provider']}",
            f"{row['ms']:.3g}",
            " ".join(f"{q:.3g}" for q in row["quartiles"]),
            f"{row['peak_bytes'] / 1e6:.3g}",
            f"{row['error']:.1e}",
        ]
        for row in section["rows"]
    ]
    grown = ", ".join(f"{provider} {slope:.2f}" for provider, slope in section["memory_slopes"].items())
    growth = f"Between the two longest, memory grows with the length to the power of: {grown}."
    return f"{sentence(section)}\n\n{table(header, lines)}\n\n{growth}"


def _reasons(groups: dict[Any, Columns], orders: tuple[str, ...]) -> list[str]:
    """Why some figures are missing, once each."""
    reasons = {
        f"{_TITLES[r['provider']]}: {r['reason']}": None for c in groups.values() for r in c.values() if r["ms"] is None
    }
    return ["", *(f"- {reason}" for reason in reasons)] if reasons else []


def replace(text: str, name: str, content: str) -> str:
    """The text with new content between the markers of that name."""
    pattern = re.compile(rf"(<!-- benchmarks:begin {name} -->\n).*?(<!-- benchmarks:end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there are no markers <!-- benchmarks:begin {name} --> and <!-- benchmarks:end {name} -->")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


_SECTIONS = {
    "double_backward": "Second backwards of PyTorch's operators", "jacobian": "Jacobian penalties",
    "cotangents": "Random directions", "attacks": "Attacks", "methods": "Training steps of every method",
    "attention": "Attention, differentiated twice", "precision": "Error, time and memory of a penalised step",
}  # fmt: skip
BLOCKS = (
    ("precision", bench_precision.document),
    ("ops", ops_table),
    ("double_backward", double_backward_table),
    ("steps", steps_table),
    ("jacobian", jacobian_table),
    ("cotangents", attack_tables.cotangents),
    ("attacks", attack_tables.attacks),
    ("methods", attack_tables.methods),
)


def featured(everything: dict[Path, Row], name: str) -> tuple[list[Path], list[Path]]:
    """The results whose tables of this section docs/benchmarks.md shows, and those that it links to.

    Shown are every GPU's, and those of the processor with the most figures, not the best; of several, the last.
    """
    measured = [path for path, results in everything.items() if name in results]
    processors = [path for path in measured if path.stem.startswith("cpu-")]

    def measure_of(path: Path) -> tuple[int, str]:
        section = everything[path][name]
        rows = section.get("rows") or section.get("attacks", [])
        return sum(row.get("ms", 0) is not None for row in rows), section["stamp"]["date"]

    best = max(processors, key=measure_of, default=None)
    shown = [path for path in measured if path == best or path not in processors]
    return shown, [path for path in measured if path not in shown]


def elsewhere(results: Row, path: Path, name: str) -> str:
    """One sentence on a machine whose table of this section is not in docs/benchmarks.md."""
    link = f"[benchmarks/results/{path.stem}.md](../benchmarks/results/{path.stem}.md)"
    device = results[name]["stamp"]["device"]
    if name != "steps":
        return f"{device}: {link}."
    spans = []
    for provider, title in (("installed", "robustkern installed"), ("eager", "stock eager")):
        found = [row["ratio"] for row in results[name]["rows"] if row["provider"] == provider and row.get("ratio")]
        if found:
            spans.append(f"{title} {min(found):.2f}x to {max(found):.2f}x")
    return f"{device}: {', '.join(spans)}: {link}."


def machine(path: Path, results: Row) -> str:
    """A link to everything that was measured on one machine."""
    device = next(iter(results.values()))["stamp"]["device"]
    return f"* [{device}](../benchmarks/results/{path.stem}.md): {', '.join(results)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something is not up to date")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--page", type=Path, default=harness.ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--readme", type=Path, help="by default the project's, where the page is")
    parser.add_argument("--images", type=Path, default=harness.ROOT / "docs" / "images")
    options = parser.parse_args(arguments)

    everything = {path: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    wanted = {path.with_suffix(".md"): full(results) for path, results in everything.items()}
    text, whole = options.page.read_text(), options.page == harness.ROOT / "docs" / "benchmarks.md"
    for name, render in BLOCKS:
        shown, linked = featured(everything, name)
        tables = [render(everything[path]) for path in shown]
        tables += [elsewhere(everything[path], path, name) for path in linked]
        text = replace(text, name, "\n\n".join(tables) if tables else "No results yet: run `make bench`.")
    if whole:
        text = replace(text, "machines", "\n".join(map(machine, everything, everything.values())))
        text = replace(text, "training", training_table(json.loads(TRAINING.read_text())["rows"]))
        wanted[robustness.RESULTS.with_suffix(".md")] = robustness.document(robustness.rows(robustness.RESULTS))
    wanted[options.page] = text
    readme = options.readme or (harness.ROOT / "README.md" if whole else None)
    if readme is not None:
        shown = [path for path in featured(everything, "precision")[0] if path.stem.startswith("cpu-")]
        tables = [bench_precision.front(everything[path]) for path in shown]
        wanted[readme] = replace(readme.read_text(), "front", "".join(tables) or "No results yet: run `make bench`.")
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    charts = {path: draw for path, draw in _charts(options.images, everything).items() if draw is not None}
    for path in [*stale, *charts]:
        if options.check:
            print(f"{path} is not up to date with benchmarks/results: run python -m benchmarks.render", file=sys.stderr)
        else:
            harness.write_atomically(path, charts[path]() if path in charts else wanted[path])
            print(f"written {path}")
    return 1 if options.check and (stale or charts) else 0


def _charts(images: Path, everything: dict[Path, Row]) -> dict[Path, Callable[[], bytes] | None]:
    """How to draw each picture; None if it is up to date."""
    found: dict[Path, Callable[[], bytes] | None] = {}

    def add(section: Row, picture: Path, drawing: Any, shown: Any) -> None:
        draw = partial(drawing.draw, shown, sentence(section))
        found[picture] = None if drawing.is_current(picture, shown) else draw

    for path, results in everything.items():
        if step_groups(results) and path in featured(everything, "steps")[0]:
            add(results["steps"], chart_path(images, path, "penalised_step"), chart, step_groups(results))
        for name, title, drawing in (
            ("jacobian", "projections", projections),
            ("precision", "precision", bench_precision),
        ):
            if path in featured(everything, name)[0]:
                add(results[name], chart_path(images, path, title), drawing, results[name])
    return found


def chart_path(images: Path, results: Path, name: str) -> Path:
    """The path of a chart; for the processor that docs/benchmarks.md shows, it has the plain name."""
    return images / (f"{name}.png" if results.stem.startswith("cpu-") else f"{name}-{results.stem}.png")


if __name__ == "__main__":
    raise SystemExit(main())
