"""Times every operator, order by order: python -m benchmarks.bench_ops.

The operators, row_norm, softmax_cross_entropy and kl_divergence, and their cases are listed in op_cases.py.  Every
provider's values and derivatives are compared with the float64 reference before anything is timed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustkern.testing import assert_as_accurate_as_reference, cast, derivatives

from . import harness
from .op_cases import OPS, ORDERS, PROVIDERS, Case, Spec, specs

_CHECKED_ELEMENTS = 1 << 20


def check(case: Case, provider: str, backend: str) -> None:
    """Raises AssertionError unless the provider computes what the reference does; tested on the first and last rows,
    since rows are independent.

    Kernels are held to the accuracy of the reference.  Other people's code must only compute the same function, to half
    of the digits.
    """
    actual = case.results(provider, backend)
    count = max(1, min(case.x.shape[0], _CHECKED_ELEMENTS // max(1, case.x[0].numel())) // 2)
    for rows in (slice(None, count), slice(-count, None)):
        truth = _reference(case, rows, torch.float64)
        eager = _reference(case, rows, torch.float32 if case.x.dtype == torch.float64 else case.x.dtype)
        for what, result, exact, rounded in zip(truth._fields, actual, truth, eager):
            zero = case.flat and what == "second"
            if result is None and zero:
                continue
            result = result.detach()[rows]
            if provider in ("robustkern", "operator"):
                assert_as_accurate_as_reference(result, rounded, exact, zero=zero, what=f"{case.spec} {what}")
            elif not zero:
                error = float((result.double() - exact).norm() / exact.norm())
                digits = torch.finfo(case.x.dtype).eps ** 0.5
                assert error <= digits, f"{case.spec} {provider} {what}: relative error {error:.2g}"


def _reference(case: Case, rows: slice, dtype: torch.dtype) -> Any:
    extra = tuple(cast(tensor[rows], dtype) for tensor in case.rows)
    grad = case.grad[rows].to(torch.float64 if dtype == torch.float64 else torch.float32)
    x: Tensor = case.x[rows].to(dtype)
    return derivatives(lambda x: case.reference(x, *extra), x, grad, case.u[rows].to(dtype))


def measure(
    spec: Spec,
    device: str,
    interleaved: harness.Interleaved,
    *,
    providers: Iterable[str],
    seconds: float,
    backend: str,
    left_out: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The rows of one case: one for each order and provider, with a figure or the reason why there is none."""
    case = spec.build(device)
    broken: dict[str, str] = {}  # if the chain of all orders fails, single orders may work
    wrong: dict[str, str] = dict(left_out)  # not timed at all
    for provider in providers:
        if provider == "operator" or provider in wrong:  # the bare kernels are those that "robustkern" is checked with
            continue
        try:
            with harness.time_limit(300):
                check(case, provider, backend)
        except AssertionError as error:
            wrong[provider] = harness.reason(error)
        except Exception as error:
            broken[provider] = harness.reason(error)
    if "robustkern" in wrong:
        wrong["operator"] = wrong["robustkern"]
    copy = harness.Copy(device, 1 << 16 if spec.size == "tiny" else None)
    rows: list[dict[str, Any]] = []
    for order in ORDERS:
        work: dict[str, harness.Work] = {"copy": copy}
        failed = {**broken, **wrong}
        for provider in providers:
            if provider in wrong:
                continue
            if provider in broken and not (provider == "compile" and order in ("forward", "backward")):
                continue
            try:
                function = case.work(provider, order, backend)
                with harness.time_limit(300):
                    function()
                work[provider] = function
                failed.pop(provider, None)
            except Exception as error:
                failed[provider] = harness.reason(error)
        timings = interleaved(work, seconds=seconds)
        bandwidth = copy.gb_per_s(timings["copy"])
        for provider in providers:
            row = {
                "op": spec.op, "case": spec.name, "shape": list(spec.shape),
                "dtype": str(spec.dtype).removeprefix("torch."),
                "size": spec.size, "order": order, "provider": provider,
            }  # fmt: skip
            if provider in failed:
                rows.append({**row, "ms": None, "reason": failed[provider]})
                continue
            timing, traffic = timings[provider], case.traffic[order]
            rate = traffic / timing.ms * 1e-6
            row.update(ms=_round(timing.ms), quartiles=[_round(q) for q in timing.quartiles], rounds=timing.rounds)
            row.update(
                bytes=traffic, gb_per_s=_round(rate), copy_gb_per_s=_round(bandwidth), of_copy=_round(rate / bandwidth)
            )
            if order == "all" and spec.size != "small" and provider != "operator":
                row["peak_bytes"] = harness.peak_memory(work[provider], device)
            rows.append(row)
        del work, timings
    return rows


def _in_turn(cases: list[Spec]) -> list[Spec]:
    """A case of each operator in turn, so that a run that is cut short leaves none out."""
    seen: dict[tuple[str, str], int] = {}
    sizes = list(dict.fromkeys(spec.size for spec in cases))

    def turn(spec: Spec) -> tuple[int, int]:
        seen[spec.size, spec.op] = seen.get((spec.size, spec.op), -1) + 1
        return sizes.index(spec.size), seen[spec.size, spec.op]

    return sorted(cases, key=turn)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def show(rows: list[dict[str, Any]]) -> None:
    """One line per order on the terminal."""
    by_order: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_order.setdefault(row["order"], {})[row["provider"]] = row
    for order, columns in by_order.items():
        cells = [f"{p} {row['ms']:.3g} ms" if row["ms"] else f"{p} -" for p, row in columns.items()]
        kernel = columns.get("operator")
        of_copy = f"  {kernel['of_copy']:.0%} of copy" if kernel and kernel["ms"] else ""
        print(f"  {order:16s}{'  '.join(cells)}{of_copy}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", nargs="+", default=["small", "large"], choices=("tiny", "small", "large"))
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--match", default="", help="only cases whose name contains this regular expression")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--seconds", type=float, default=2.0, help="roughly, for each order of each case")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no further case is begun"
    )
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
    cases = _in_turn([spec for size in options.sizes for spec in specs(size, options.device) if spec.op in options.ops])
    cases = [spec for spec in cases if re.search(options.match, str(spec))]
    started = time.perf_counter()
    for spec in cases:
        if time.perf_counter() - started > options.budget:
            print(f"time is up: {len(cases) - cases.index(spec)} of {len(cases)} cases are left out", file=sys.stderr)
            break
        print(spec, flush=True)
        late = time.perf_counter() - started > options.compile_budget
        rows = measure(
            spec,
            options.device,
            interleaved,
            providers=options.providers,
            seconds=options.seconds,
            backend=options.backend,
            left_out={"compile": harness.TOO_LATE_TO_COMPILE} if late else {},
        )
        show(rows)
        section["rows"] += rows
        harness.write_section(out, "ops", section)
        torch._dynamo.reset()
    else:
        section["complete"] = True
    harness.write_section(out, "ops", section)
    print(f"written to {out}")
    return harness.report_wrong(section["rows"])


if __name__ == "__main__":
    raise SystemExit(main())
