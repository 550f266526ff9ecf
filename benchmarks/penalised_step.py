"""Times training steps with a penalty on the input gradient against the plain step.

    python -m benchmarks.penalised_step                       everything, into benchmarks/results/<device>.json
    python -m benchmarks.penalised_step --only ConvNeXt ViT   these rows anew; the others keep their figures
    python -m benchmarks.penalised_step --resume              what this commit has not measured yet
    python -m benchmarks.penalised_step --runs 5            that many runs of each row, for intervals of its multiples
    python -m benchmarks.penalised_step --size tiny           checks that everything runs; writes only to --out

The gradients of every column are compared with those of stock PyTorch in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import harness
from .step_cases import (
    COMPILED,
    FINITE_DIFFERENCES,
    GRAPHED,
    JAX,
    PLAIN,
    PLAIN_INSTALLED,
    PROVIDERS,
    STOCK,
    Case,
    Spec,
    Step,
    exact,
    flat,
    specs,
)
from .supervise import Progress, supervise

STOCK_COMPILED, _ = COMPILED

Row = dict[str, Any]


class Truth:
    """The float64 gradients of one case, and how far stock float32 is from them."""

    def __init__(self, spec: Spec, device: str, measured: Iterable[str] = ()) -> None:
        self.spec, self.device = spec, device
        self._measured = set(measured)  # columns of this run: the error of stock comes with its column, if that is one
        self._exact: dict[str, Tensor] = {}
        self._stock_error: dict[str, float] = {}
        self._compiled: Tensor | None = None  # gradient of stock torch.compile

    def error(self, provider: str, gradient: Tensor) -> float:
        """The gradient's relative error; AssertionError if it cannot be that of such a step.

        It must be right to half of the digits, or to four times stock PyTorch's own error where that is larger: an
        activation near its kink can fall on either side.  Where stock torch.compile is further off, torch.compile with
        robustkern must agree with it within the same bound.  Finite differences are inexact by nature, and bfloat16
        autocast rounds more than any kernel: their error is recorded, not judged.
        """
        stock = PLAIN if provider.startswith(PLAIN) else STOCK
        if stock not in self._exact:
            self._exact[stock] = exact(self.spec, self.device, stock)
        error = self._off(gradient, stock)
        if provider == stock:
            self._stock_error[stock] = error
        if provider == FINITE_DIFFERENCES or self.spec.autocast:
            return error
        if stock not in self._stock_error and stock not in self._measured:
            self._stock_error[stock] = self._off(Case(self.spec, self.device).gradient(stock), stock)
        digits = torch.finfo(torch.float32).eps ** 0.5
        allowed = max(digits, 4 * self._stock_error.get(stock, 0))
        judged = error
        if provider == stock:
            allowed = 0.1
        elif provider in (STOCK_COMPILED, JAX):
            allowed = max(0.01, allowed)
        elif provider in COMPILED and self._compiled is not None:
            judged = min(error, float((gradient - self._compiled).norm() / self._exact[stock].norm()))
        assert judged <= allowed, f"{self.spec} {provider}: relative error {error:.2g} of the gradient"
        if provider == STOCK_COMPILED:
            self._compiled = gradient
        return error

    def _off(self, gradient: Tensor, stock: str) -> float:
        truth = self._exact[stock]
        return float((gradient.double() - truth).norm() / truth.norm())


@dataclass(frozen=True)
class Options:
    """How to measure a case."""

    providers: tuple[str, ...]
    seconds: float  # for each provider and run
    runs: int  # of all providers, one run after the other
    backend: str  # of torch.compile
    limit: float  # seconds that one provider may compile and check
    compiling: bool


def measure(
    spec: Spec, device: str, interleaved: harness.Interleaved, options: Options, progress: Progress
) -> list[Row]:
    """One row for each provider, with a figure or the reason why there is none."""
    providers = [p for p in options.providers if p in spec.providers]
    case, truth = Case(spec, device), Truth(spec, device, providers)
    steps: dict[str, Step] = {}
    facts: dict[str, Row] = {}
    for provider in providers:
        left_out = progress.why_left_out(str(spec), provider)
        if provider in COMPILED and not options.compiling:
            left_out = harness.TOO_LATE_TO_COMPILE
        if left_out:
            facts[provider] = {"ms": None, "reason": left_out}
            continue
        progress.enter(str(spec), provider)
        try:
            with harness.time_limit(options.limit):
                step, gradients, first = _first_call(case, provider, options.backend)
                error = truth.error(provider, flat(gradients))
            del gradients
            # A replay allocates nothing: it holds what its recording took.
            whole = partial(case.step, provider, options.backend) if provider == GRAPHED else step
            peak = None if provider == JAX else harness.peak_memory(whole, device)  # JAX's memory is its own
            facts[provider] = {"gradient_error": _round(error), "peak_bytes": peak}
            if provider in (*COMPILED, JAX):
                facts[provider]["first_call_s"] = _round(first)
            steps[provider] = step
        except Exception as failure:
            facts[provider] = {"ms": None, "reason": harness.reason(failure)}
    progress.enter(str(spec))
    ratios: dict[str, list[float]] = {}  # of every run, in which all of a row took turns
    for _ in range(options.runs):
        timings = interleaved(steps, seconds=options.seconds * len(steps), equally_long=True)
        run = {name: timing.over(timings[PLAIN]) for name, timing in timings.items() if PLAIN in timings}
        both = {name: steps[name] for name in (PLAIN, PLAIN_INSTALLED) if name in steps}
        if len(both) == 2:  # a difference of one per cent needs more rounds than a factor does
            pair = interleaved(both, seconds=3 * options.seconds)
            timings[PLAIN_INSTALLED] = pair[PLAIN_INSTALLED]
            run[PLAIN_INSTALLED] = pair[PLAIN_INSTALLED].over(pair[PLAIN])
        for name, ratio in run.items():
            ratios.setdefault(name, []).append(ratio)
    rows = []
    for provider in providers:
        row = {"model": spec.name, "penalty": spec.penalty, "provider": provider}
        if provider in timings:
            timing = timings[provider]
            row.update(ms=_round(timing.ms), quartiles=[_round(q) for q in timing.quartiles], rounds=timing.rounds)
            if provider in ratios:
                row["ratio"] = _round(statistics.median(ratios[provider]))
                row["ratios"] = [_round(ratio) for ratio in ratios[provider]]
        rows.append({**row, **facts[provider]})
    return rows


def _first_call(case: Case, provider: str, backend: str) -> tuple[Step, tuple[Tensor, ...], float]:
    """The step, its gradients and the seconds that making and running it took."""
    began = time.perf_counter()
    step = case.step(provider, backend)
    gradients = step()
    harness.synchronize(case.device)
    return step, gradients, time.perf_counter() - began


@contextmanager
def _compiling_anew(backend: str) -> Iterator[None]:
    """Without what earlier runs left in Inductor's cache, and with the headers that it compiles once in a while."""
    if backend != "inductor":
        yield
        return
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        torch.compile(torch.sin)(torch.rand(100))
        torch._dynamo.reset()
        yield


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def show(rows: list[Row]) -> None:
    """One line per provider on the terminal."""
    plain = next((row.get("peak_bytes") for row in rows if row["provider"] == PLAIN), None)
    for row in rows:
        if row["ms"] is None:
            print(f"  {row['provider']:20s} {row['reason']}", flush=True)
            continue
        ratio, peak = row.get("ratio", float("nan")), row["peak_bytes"]
        memory = f"{peak / 1e6:8.1f} MB" + (f" {peak / plain:5.2f}x" if plain else "") if peak else ""
        first = f"  first call {row['first_call_s']:.0f} s" if "first_call_s" in row else ""
        error = f"error {row['gradient_error']:.1e}"
        print(f"  {row['provider']:20s} {row['ms']:9.3f} ms {ratio:6.3f}x {memory}  {error}{first}", flush=True)


class Section:
    """The steps of a results file: rows of this run replace those of the same case, all others stay."""

    def __init__(self, path: Path | None, stamp: Row, known: Iterable[Spec]) -> None:
        self.path, self.stamp = path, stamp
        self.known = [(spec.name, spec.penalty) for spec in known]
        everything = json.loads(path.read_text()) if path is not None and path.exists() else {}
        rows = everything.get("steps", {}).get("rows", [])
        self.rows = [row for row in rows if _case(row) in self.known]

    def holds(self, spec: Spec, providers: Iterable[str]) -> bool:
        """Whether this commit has measured the case already."""
        rows = [row for row in self.rows if _case(row) == (spec.name, spec.penalty)]
        measured = {row["provider"] for row in rows if row.get("commit") == self.stamp["commit"]}
        return measured >= set(providers) & set(spec.providers)

    def add(self, rows: list[Row]) -> None:
        """Merges and writes."""
        fresh = [{**row, "commit": self.stamp["commit"], "date": self.stamp["date"]} for row in rows]
        replaced = {(*_case(row), row["provider"]) for row in rows}
        self.rows = [row for row in self.rows if (*_case(row), row["provider"]) not in replaced] + fresh
        self.rows.sort(key=lambda row: (self.known.index(_case(row)), PROVIDERS.index(row["provider"])))
        if self.path is not None:
            complete = {_case(row) for row in self.rows} == set(self.known)
            content = {"stamp": self.stamp, "complete": complete, "rows": self.rows}
            harness.write_section(self.path, "steps", content)


def _case(row: Row) -> tuple[str, str]:
    return row["model"], row["penalty"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--size", default="full", choices=("tiny", "full"))
    add("--only", nargs="+", default=[""], help="only cases whose name contains one of these regular expressions")
    add("--resume", action="store_true", help="leave out the cases that this commit has measured")
    add("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    add("--seconds", type=float, default=3.0, help="roughly, for each provider of each case and run")
    add("--runs", type=int, default=3, help="of each case")
    add("--budget", type=float, default=float("inf"), help="seconds after which no further case is begun")
    add("--limit", type=float, default=150.0, help="seconds that one provider may compile and check")
    add("--compile-budget", type=float, default=float("inf"), help="seconds after which nothing is compiled")
    add("--backend", default="inductor", help="of torch.compile")
    add("--out", type=Path, help="results file; by default named after the device, and none for --size tiny")
    add("--progress", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.progress is None:
        given = sys.argv[1:] if arguments is None else arguments
        return supervise(
            "benchmarks.penalised_step", [*given, *(["--out", str(options.out.resolve())] if options.out else [])]
        )
    progress = Progress(options.progress)
    kept = harness.keep_pages() if options.device == "cpu" else None
    out = options.out or (harness.results_path(options.device) if options.size == "full" else None)
    known = specs(options.size, options.device)
    section = Section(out, {**harness.stamp(options.device), "pages_kept": kept}, known)
    cases = [spec for spec in known if any(re.search(pattern, str(spec)) for pattern in options.only)]
    cases = [spec for spec in cases if not progress.is_finished(str(spec))]
    if options.resume:
        cases = [spec for spec in cases if not section.holds(spec, options.providers)]
    rows: list[Row] = []
    started = time.perf_counter()
    with _compiling_anew(options.backend if set(options.providers) & set(COMPILED) else ""):
        interleaved = harness.Interleaved(options.device)
        for number, spec in enumerate(cases):
            elapsed = time.perf_counter() - started
            if elapsed > options.budget:
                print(f"time is up: {len(cases) - number} of {len(cases)} cases are left out", file=sys.stderr)
                break
            print(f"{spec}  ({number + 1} of {len(cases)}, {elapsed:.0f} s)", flush=True)
            compiling = elapsed <= options.compile_budget
            how = Options(
                tuple(options.providers), options.seconds, options.runs, options.backend, options.limit, compiling
            )
            measured = measure(spec, options.device, interleaved, how, progress)
            show(measured)
            section.add(measured)
            progress.finish(str(spec))
            rows += measured
            torch._dynamo.reset()
    print(f"{time.perf_counter() - started:.0f} s" + (f", written to {out}" if out else ""))
    return harness.report_wrong(rows)


if __name__ == "__main__":
    raise SystemExit(main())
