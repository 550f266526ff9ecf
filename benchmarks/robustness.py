"""Trains and evaluates each method, one row of the results table at a time: python -m benchmarks.robustness.

    python -m benchmarks.robustness --method trades --seed 0     one row: train, attack, write
    python -m benchmarks.robustness --seeds 3                    every method; rows that are there already are left out

A row is what `robustkern train` and `robustkern evaluate` give with the recipe of the data set, on one thread, so that
two rows can be made at a time. Killed at any moment, the same command goes on: runs resume, and each finished row is
written at once to docs/robustness.json, from which `python -m benchmarks.render` writes docs/robustness.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from robustkern._progress import TrainingProgress
from robustkern.evaluation.command import evaluate_run
from robustkern.training import METHODS, recipe, train

from . import harness
from .markdown import Row, table

RESULTS = harness.ROOT / "docs" / "robustness.json"
_KEY = ("data", "method", "seed")


def rows(path: Path) -> list[Row]:
    """The rows written so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def measure(data: str, method: str, seed: int, runs: Path, settings: Row, options: Row, console: Console) -> Row:
    """Train and evaluate one model; a run that was begun goes on."""
    config = recipe(data, method, seed=seed, threads=1, **options)
    out = runs / f"{data}-{method}-{seed}"
    with TrainingProgress(console) as progress:
        result = train(config, out, resume=(out / "config.yaml").exists(), observer=progress)
    report = evaluate_run(out, console, threads=1, seed=seed, **settings)
    last = result.rows[-1]
    return {
        "data": data, "method": method, "seed": seed, "model": config.model, "eps": config.eps,
        "epochs": config.epochs, "options": config.options, "parts": ["clean", *(a.name for a in report.attacks)],
        "accuracies": {a.name: a.to_dict() for a in (report.clean, *report.attacks)},
        "worst": report.worst.to_dict() if report.worst else None,
        "failed_checks": [check.name for check in report.checks if not check.passed],
        "orientation": last["orientation"], "smoothness": last["smoothness"],
        "ms_per_step": statistics.median(row["ms_per_step"] or 0.0 for row in result.rows),
        "command": f"python -m benchmarks.robustness --data {data} --method {method} --seed {seed}",
        "stamp": harness.stamp("cpu"),
    }  # fmt: skip


def add(path: Path, row: Row) -> None:
    """Write a row in place of the one with the same key; safe while another process does the same."""
    with _locked(path):
        others = [r for r in rows(path) if any(r[k] != row[k] for k in _KEY)]
        ordered = sorted([*others, row], key=lambda r: (r["data"], list(METHODS).index(r["method"]), r["seed"]))
        harness.write_atomically(path, json.dumps({"rows": ordered}, indent=1) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def document(everything: list[Row]) -> str:
    """docs/robustness.md: a table for each data set, a line for each method, means over the seeds."""
    parts = ["# Robust accuracy of every method", "", __doc__.split("\n\n")[2].strip(), ""]
    for data in dict.fromkeys(row["data"] for row in everything):
        chosen = [row for row in everything if row["data"] == data]
        first = chosen[0]
        attacks = list(dict.fromkeys(name for row in chosen for name in row["parts"]))
        count = first["accuracies"]["clean"]["samples"]
        header = [
            "method",
            "seeds",
            *attacks,
            "worst case",
            "orientation",
            "smoothness",
            "ms/step",
            "checks that failed",
        ]
        lines = []
        for method in dict.fromkeys(row["method"] for row in chosen):
            same = [row for row in chosen if row["method"] == method]
            cells = [_percent([r["accuracies"][a]["accuracy"] for r in same if a in r["accuracies"]]) for a in attacks]
            cells.append(_percent([r["worst"]["accuracy"] for r in same if r["worst"]]))
            failed = ", ".join(sorted({name for row in same for name in row["failed_checks"]})) or "none"
            terms = [f"{statistics.mean(r[term] for r in same):.3g}" for term in ("orientation", "smoothness")]
            speed = f"{statistics.mean(r['ms_per_step'] for r in same):.0f}"
            lines.append([method, str(len(same)), *cells, *terms, speed, failed])
        parts += [
            f"## {data}",
            "",
            f"{first['model']}, Linf, eps {first['eps']:g}, {first['epochs']} epochs, one thread of "
            f"{first['stamp']['device']}; the first {count} test images; mean ± standard deviation over the seeds. A "
            f"single accuracy of {count} images has a 95 % interval of up to ±{100 * 0.98 / count**0.5:.1f} points.",
            "",
            table(header, lines),
            "",
            "One row: `" + first["command"].rsplit(" --method", 1)[0] + " --method METHOD --seed SEED`.",
            "",
        ]  # fmt: skip
    return "\n".join(parts).rstrip() + "\n"


def _percent(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--method", nargs="*", choices=list(METHODS), help="by default every one")
    parser.add_argument("--seed", type=int, nargs="*", help="by default 0 to SEEDS - 1")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--attacks", default="pgd,apgd,autoattack")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, help="by default the recipe's")
    parser.add_argument("--runs", type=Path, default=harness.ROOT / "runs" / "robustness")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    given = parser.parse_args(arguments)
    options: dict[str, Any] = {"eval_every": 10**6, **({"epochs": given.epochs} if given.epochs else {})}
    settings = {"samples": given.samples, "attacks": tuple(given.attacks.split(","))}
    console = Console()
    for seed in range(given.seeds) if given.seed is None else given.seed:
        for method in given.method or METHODS:
            key = dict(zip(_KEY, (given.data, method, seed)))
            if not given.again and any(all(row[k] == v for k, v in key.items()) for row in rows(given.out)):
                continue
            if "teacher" in METHODS[method].options:
                teacher = given.runs / f"{given.data}-standard-{seed}"
                options = {**options, "options": {"teacher": str(teacher)}}
            started = time.perf_counter()
            row = measure(given.data, method, seed, given.runs, settings, options, console)
            options.pop("options", None)
            add(given.out, {**row, "minutes": round((time.perf_counter() - started) / 60, 1)})
            print(f"{method}, seed {seed}: written to {given.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
