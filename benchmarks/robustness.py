"""Trains and evaluates each method, one row of the results table at a time: python -m benchmarks.robustness.

    python -m benchmarks.robustness --method trades --seed 0     one row: train, attack, write
    python -m benchmarks.robustness --seeds 3 --jobs 2           every method, two rows at a time
    python -m benchmarks.robustness --time                       time a step of each row's method again, on its own

A row is what `robustkern train` and `robustkern evaluate` give with the recipe of the data set, on one thread. If it
is killed, the same command goes on: rows that are there already are left out, runs resume, and each finished row is
written at once to docs/robustness.json, from which `python -m benchmarks.render` writes docs/robustness.md. The runs of
a study (`robustkern study`) with as many epochs are used as they are: --runs STUDY/models.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from robustkern.cli.evaluate import evaluate_run
from robustkern.study.parallel import in_parallel
from robustkern.training import METHODS, TrainingConfig, recipe, teacher_recipe, train

from . import harness
from .markdown import Row, table

INTRODUCTION = (
    "Each row is trained by `robustkern train` with the recipe of the data set, and attacked by `robustkern evaluate`. "
    "Worst case: the images that withstood every attack. Tables are written by `python -m benchmarks.render`."
)
RESULTS = harness.ROOT / "docs" / "robustness.json"
_CHECKS = (
    "gradients: the loss has none at some images, and attacks nothing to follow. radii: accuracy does not fall to "
    "nothing as the radius grows. AutoAttack's flags: its black-box attack, Square, got further than its white-box "
    "ones had, which is counted; what it would have found with more queries is not."
)
_KEY = ("data", "method", "seed")


def rows(path: Path) -> list[Row]:
    """The rows written so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


@dataclass(frozen=True)
class Work:
    """How rows are made."""

    data: str
    runs: Path
    out: Path
    epochs: int | None
    settings: Row

    def config(self, method: str, seed: int) -> TrainingConfig:
        given = self._given(seed)
        if "teacher" in METHODS[method].options:
            given["options"] = {"teacher": str(self.run("distillation-teacher", seed).resolve())}
        return recipe(self.data, method, **given)

    def teacher(self, seed: int) -> TrainingConfig:
        return teacher_recipe(self.data, **self._given(seed))

    def _given(self, seed: int) -> dict[str, Any]:
        epochs = {"epochs": self.epochs} if self.epochs else {}
        return {"eval_every": 10**6, "threads": 1, "seed": seed, **epochs}

    def run(self, method: str, seed: int) -> Path:
        return self.runs / f"{method}-{seed}"

    def command(self, method: str, seed: int) -> str:
        """The command that makes the row again."""
        words = ["python -m benchmarks.robustness", f"--data {self.data}", f"--method {method}", f"--seed {seed}"]
        return " ".join([*words, *([f"--epochs {self.epochs}"] if self.epochs else []), "--again"])


def make(key: tuple[str, int], work: Work) -> None:
    """Train and evaluate one model, and write its row; a run that was begun goes on."""
    method, seed = key
    console = Console(quiet=True)
    started = time.perf_counter()
    config, run = work.config(method, seed), work.run(method, seed)
    if "teacher" in config.options:
        train(work.teacher(seed), work.run("distillation-teacher", seed), resume=True)
    result = train(config, run, resume=True)
    trained = time.perf_counter()
    report = evaluate_run(run, console, threads=1, seed=seed, **work.settings)
    last = result.rows[-1]
    options = {name: value for name, value in config.options.items() if name != "teacher"}
    add(work.out, {
        "data": work.data, "method": method, "seed": seed, "model": config.model, "eps": config.eps,
        "epochs": config.epochs, "options": options,
        "parts": ["clean", *(a.name for a in report.attacks)],
        "accuracies": {a.name: a.to_dict() for a in (report.clean, *report.attacks)},
        "worst": report.worst.to_dict() if report.worst else None,
        "failed_checks": [check.name for check in report.checks if not check.passed],
        "orientation": last["orientation"], "smoothness": last["smoothness"],
        "ms_per_step": min(row["ms_per_step"] or math.inf for row in result.rows),
        "steps": last["step"],
        "training_minutes": _minutes(statistics.mean(row["ms_per_step"] or 0.0 for row in result.rows), last["step"]),
        "evaluation_minutes": round((time.perf_counter() - trained) / 60, 2),
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "command": work.command(method, seed),
        "stamp": harness.stamp("cpu"),
    })  # fmt: skip


def _minutes(milliseconds: float, steps: int) -> float:
    return round(milliseconds * steps / 6e4, 2)


def time_steps(work: Work, steps: int = 20) -> None:
    """Put into every row what a step of its method, and so its training, takes when nothing else runs."""
    measured: dict[str, float] = {}
    for row in [row for row in rows(work.out) if row["data"] == work.data]:
        method = row["method"]
        if method not in measured:
            with tempfile.TemporaryDirectory() as folder:
                config = work.config(method, row["seed"])
                # The weight's ramp is over at once: the first epoch would not pay for the penalty.
                short = dataclasses.replace(
                    config, epochs=3, train_samples=steps * config.batch_size, ramp=0.0, eval_samples=1, pgd_steps=1
                )
                measured[method] = min(r["ms_per_step"] or math.inf for r in train(short, Path(folder) / "run").rows)
            print(f"{method}: {measured[method]:.1f} ms", file=sys.stderr)
        taken = {"ms_per_step": measured[method], "training_minutes": _minutes(measured[method], row["steps"])}
        add(work.out, {**row, **taken})


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
    parts = ["# Robust accuracy of every method", "", INTRODUCTION, ""]
    for data in dict.fromkeys(row["data"] for row in everything):
        chosen = [row for row in everything if row["data"] == data]
        first = chosen[0]
        attacks = list(dict.fromkeys(name for row in chosen for name in row["parts"]))
        count = first["accuracies"]["clean"]["samples"]
        header = ["method", "seeds", *attacks, "worst case", "orientation", "smoothness", "ms/step", "training, min"]
        lines, failures = [], []
        for method in dict.fromkeys(row["method"] for row in chosen):
            same = [row for row in chosen if row["method"] == method]
            cells = [_percent([r["accuracies"][a]["accuracy"] for r in same if a in r["accuracies"]]) for a in attacks]
            cells.append(_percent([r["worst"]["accuracy"] for r in same if r["worst"]]))
            terms = [f"{statistics.mean(r[term] for r in same):.3g}" for term in ("orientation", "smoothness")]
            speed = [f"{statistics.mean(r['ms_per_step'] for r in same):.0f}"]
            speed.append(f"{statistics.mean(r['training_minutes'] for r in same):.1f}")
            lines.append([method, str(len(same)), *cells, *terms, *speed])
            failed = sorted({name for row in same for name in row["failed_checks"]})
            if failed:
                failures.append(f"* {method}: {', '.join(failed)}")
        parts += [
            f"## {data}",
            "",
            f"{first['model']}, Linf, eps {first['eps']:g}, {first['epochs']} epochs, one thread of "
            f"{first['stamp']['device']}; the first {count} test images, percent; mean ± standard deviation over the "
            f"seeds. A single accuracy of {count} images has a 95 % interval of up to ±{100 * 0.98 / count**0.5:.1f} "
            "points. Orientation and smoothness are the means of the loss's two terms over the last epoch, each in its "
            "method's own units.",
            "",
            table(header, lines),
            "",
            "One row: `" + re.sub(r"--method \S+ --seed \S+", "--method METHOD --seed SEED", first["command"]) + "`.",
            "",
        ]  # fmt: skip
        if failures:
            parts += ["Self-checks of the evaluation that a model failed:", "", *failures, "", _CHECKS, ""]
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
    parser.add_argument("--attacks", default="pgd,autoattack")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, help="by default the recipe's")
    parser.add_argument("--runs", type=Path, help="by default runs/robustness/DATA")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    parser.add_argument("--time", action="store_true", help="only time steps, of the rows that are there")
    given = parser.parse_args(arguments)
    runs = given.runs or harness.ROOT / "runs" / "robustness" / given.data
    settings = {"samples": given.samples, "attacks": tuple(given.attacks.split(","))}
    work = Work(given.data, runs, given.out, given.epochs, settings)
    if given.time:
        time_steps(work)
        return 0
    there = {(row["method"], row["seed"]) for row in rows(given.out) if row["data"] == given.data}
    seeds = range(given.seeds) if given.seed is None else given.seed
    keys = [(method, seed) for seed in seeds for method in given.method or METHODS]
    for method, seed in [] if given.again else [key for key in keys if key in there]:
        print(f"{method}, seed {seed}: there already in {given.out}; --again makes it anew", file=sys.stderr)
    keys = [key for key in keys if given.again or key not in there]

    def on_done(number: int) -> None:
        print("{}, seed {}: written to {}".format(*keys[number], given.out), file=sys.stderr)

    in_parallel(keys, partial(make, work=work), given.jobs, on_done=on_done)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
