"""Times training steps with a penalty on the input gradient against the plain step: python -m benchmarks.bench_steps.

The parameter gradients of every provider are compared with those of stock PyTorch in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustkern.testing import assert_as_accurate_as_reference

from . import harness
from .step_cases import PLAIN, PROVIDERS, Case, Spec, specs


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def check(spec: Spec, case: Case, provider: str, gradient: Tensor) -> float:
    """The gradient's relative error; AssertionError if it is none of a step of this kind.

    Finite differences are inexact by nature, and bfloat16 autocast rounds more than any kernel: their error is
    recorded, not judged.
    """
    stock = PLAIN if provider.startswith(PLAIN) else "eager"
    exact = Case(Spec(**{**vars(spec), "autocast": False}), case.device, torch.float64).gradient(stock)
    error = _error(gradient, exact)
    if provider == "finite_differences" or spec.autocast:
        return error
    if provider == "robustkern":
        assert_as_accurate_as_reference(gradient, case.gradient(stock), exact, what=f"{spec} gradient")
    digits = torch.finfo(torch.float32).eps ** 0.5
    assert error <= digits, f"{spec} {provider}: relative error {error:.2g} of the gradient"
    return error


def measure(
    spec: Spec,
    device: str,
    interleaved: harness.Interleaved,
    *,
    providers: Iterable[str],
    seconds: float,
    backend: str,
    limit: float,
    compiling: bool,
) -> list[dict[str, Any]]:
    """One row for each provider, with a figure or the reason why there is none."""
    case = Case(spec, device)
    work: dict[str, harness.Work] = {}
    facts: dict[str, dict[str, Any]] = {}
    for provider in providers:
        began, compiled = time.perf_counter(), provider.endswith(("compile", "compiled"))
        if compiled and not compiling:
            facts[provider] = {"ms": None, "reason": harness.TOO_LATE_TO_COMPILE}
            continue
        try:
            with harness.time_limit(limit):
                function = case.work(provider, backend)
                returned = function()
                grads = [p.grad for p in case.parameters] if returned is None else returned
                first = time.perf_counter() - began
                error = check(spec, case, provider, torch.cat([g.detach().flatten() for g in grads]))
            facts[provider] = {"gradient_error": _round(error), "peak_bytes": harness.peak_memory(function, device)}
            if compiled:
                facts[provider]["first_call_s"] = _round(first)
            work[provider] = function
        except Exception as failure:
            facts[provider] = {"ms": None, "reason": harness.reason(failure)}
    timings = interleaved(work, seconds=seconds * len(work))
    rows = []
    for provider in providers:
        row = {"model": spec.name, "penalty": spec.penalty, "provider": provider}
        if provider in timings:
            timing = timings[provider]
            row.update(ms=_round(timing.ms), quartiles=[_round(q) for q in timing.quartiles], rounds=timing.rounds)
            if PLAIN in timings:
                row["ratio"] = _round(timing.ms / timings[PLAIN].ms)
        rows.append({**row, **facts[provider]})
    return rows


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def show(rows: list[dict[str, Any]]) -> None:
    """One line per provider on the terminal."""
    for row in rows:
        if row["ms"] is None:
            print(f"  {row['provider']:20s} {row['reason']}", flush=True)
        else:
            error = row["gradient_error"]
            ratio, peak = row.get("ratio", float("nan")), row["peak_bytes"] / 1e6
            print(
                f"  {row['provider']:20s} {row['ms']:9.3f} ms {ratio:6.2f}x {peak:8.1f} MB  error {error:.1e}",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--match", default="", help="a regular expression: only cases whose name it is found in")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--seconds", type=float, default=3.0, help="roughly, for each provider of each case")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no further case is begun"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one provider may compile and check")
    parser.add_argument(
        "--compile-budget", type=float, default=float("inf"), help="seconds after which nothing is compiled"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, help="results file; by default named after the device")
    options = parser.parse_args(arguments)

    kept = harness.keep_pages() if options.device == "cpu" else None
    out = options.out or harness.results_path(options.device)
    section = {"stamp": {**harness.stamp(options.device), "pages_kept": kept}, "complete": False, "rows": []}
    interleaved = harness.Interleaved(options.device)
    cases = [spec for spec in specs(options.size, options.device) if re.search(options.match, str(spec))]
    started = time.perf_counter()
    for spec in cases:
        if time.perf_counter() - started > options.budget:
            print(f"time is up: {len(cases) - cases.index(spec)} of {len(cases)} cases are left out", file=sys.stderr)
            break
        print(spec, flush=True)
        rows = measure(
            spec, options.device, interleaved,
            providers=options.providers, seconds=options.seconds, backend=options.backend, limit=options.limit,
            compiling=time.perf_counter() - started <= options.compile_budget,
        )  # fmt: skip
        show(rows)
        section["rows"] += rows
        harness.write_section(out, "steps", section)
        torch._dynamo.reset()
    else:
        section["complete"] = True
    harness.write_section(out, "steps", section)
    print(f"written to {out}")
    return harness.report_wrong(section["rows"])


if __name__ == "__main__":
    raise SystemExit(main())
