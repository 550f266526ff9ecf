"""Times the cases of the CUDA budget by graph replay: python -m benchmarks.gpu_kernels.

Replays of a graph of several calls leave out what the host takes, which is more than a kernel of 20 microseconds does.
The calls of a graph take turns over copies of their tensors, of 0.5 GB together, so that none finds its tensors in L2.

--counters FILE reads the results of an earlier call and asks ncu what the hardware counts in the cases that miss.
With --device cpu the calls run as they are: a rehearsal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import robustkern  # noqa: F401 - registers the operators

from . import harness
from .cuda_budget.cases import CASES, Case

AT_LEAST = 1 << 29  # bytes that the calls of one graph go over before one comes back to a tensor
CALLS = 8  # of one graph, at least
TARGET = 0.85  # share of the copy
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "l1tex__data_pipe_lsu_wavefronts.sum",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
)


class _Recorded(Exception):
    """The operator's call that a case makes."""


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "robustkern":
            raise _Recorded(func, args)
        return func(*args, **(kwargs or {}))


def recorded(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a case and its arguments, whose tensors hold nothing yet."""
    try:
        with _Recorder():
            case.call()
    except _Recorded as call:
        operator, arguments = call.args
        return operator, arguments
    raise AssertionError(f"{case.name} calls no operator of robustkern")


def filled(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The same with random numbers: normal ones as images and rows, positive ones for every channel or row."""

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        new = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        if not value.is_floating_point():
            classes = next(v.shape[1] for v in arguments if isinstance(v, Tensor) and v.dim() > 1)
            return new.random_(0, classes)
        return new.normal_() if value.numel() > 1 << 16 else new.uniform_(0.5, 1.5)

    return tuple(fill(value) for value in arguments)


def calls_of(case: Case, device: str) -> list[Callable[[], object]]:
    """Calls of one graph, in turns over as many copies of the tensors as make AT_LEAST."""
    operator, arguments = recorded(case)
    size = sum(a.nbytes for a in arguments if isinstance(a, Tensor))
    copies = [filled(arguments, device) for _ in range(max(1, math.ceil(AT_LEAST / size) if device == "cuda" else 1))]
    count = math.ceil(CALLS / len(copies)) * len(copies) if device == "cuda" else 1
    return [lambda c=c: operator(*c) for c in itertools.islice(itertools.cycle(copies), count)]  # type: ignore[misc]


def timed(calls: list[Callable[[], object]], device: str, seconds: float) -> float:
    """Milliseconds of one call: the median over replays."""

    def run() -> None:
        for call in calls:
            call()

    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began) / len(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / len(calls))
    return statistics.median(samples)


def measure(options: argparse.Namespace) -> int:
    cases = [c for c in CASES.values() if any(re.search(pattern, c.name) for pattern in options.only)]
    if options.size == "tiny":
        cases = sorted(cases, key=lambda c: c.tensor_bytes)[:4]
    copy = harness.Copy(options.device, 1 << 24 if options.size == "tiny" else None)
    rate = copy.gb_per_s(harness.Interleaved(options.device)({"copy": copy}, seconds=0.3)["copy"])
    print(f"copy: {rate:.0f} GB/s, read and written")
    rows, began = [], time.perf_counter()
    for number, case in enumerate(cases):
        if time.perf_counter() - began > options.budget:
            print(f"time is up: {len(cases) - number} of {len(cases)} cases are left out")
            break
        try:
            ms = timed(calls_of(case, options.device), options.device, options.seconds)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"FAILED {case.name}: {harness.reason(error)}", flush=True)
            rows.append({"case": case.name, "ms": None, "reason": harness.reason(error)})
        else:
            least = case.tensors * case.tensor_bytes
            row = {"case": case.name, "ms": ms, "bytes": least, "of_copy": least / ms * 1e-6 / rate}
            rows.append(row)
            print(f"{case.name:58s} {ms:9.4f} ms {row['of_copy']:6.1%} of copy", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if options.out:
            stamp = {**harness.stamp(options.device), "copy_gb_per_s": rate}
            harness.write_atomically(options.out, harness.dump({"stamp": stamp, "rows": rows}) + "\n")
    if options.device == "cuda" and options.size == "full":
        stamp = {**harness.stamp(options.device), "copy_gb_per_s": rate}
        harness.write_section(harness.results_path("cuda"), "kernels", {"stamp": stamp, "rows": rows})
    failed = sum(row["ms"] is None for row in rows)
    print(
        f"{len(rows)} cases, {sum((row.get('of_copy') or 0) >= TARGET for row in rows)} at {TARGET:.0%} of copy or more"
    )
    return 1 if failed else 0


def count(results: Path) -> int:
    """ncu over the cases that miss, a call each."""
    rows = json.loads(results.read_text())["rows"]
    missing = sorted((r for r in rows if r["ms"] and r["of_copy"] < TARGET), key=lambda r: r["of_copy"])
    for row in missing:
        # By their mangled names, which alone hold the namespace.
        kernels = ["--kernel-name-base", "mangled", "--kernel-name", "regex:2rk4cuda"]
        command = ["ncu", "--clock-control", "none", *kernels, "--metrics", ",".join(COUNTERS), "--csv"]
        run = [sys.executable, "-m", "benchmarks.gpu_kernels", "--once", "--only", f"^{re.escape(row['case'])}$"]
        output = subprocess.run([*command, *run], capture_output=True, text=True, check=False).stdout
        print(f"== {row['case']}, {row['of_copy']:.0%} of copy")
        print("\n".join(line for line in output.splitlines() if line.startswith('"')), flush=True)
    print(f"{len(missing)} cases below {TARGET:.0%} of copy counted")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", choices=["cpu", "cuda"])
    add("--size", default="full", choices=["tiny", "full"])
    add("--only", nargs="+", default=[""], help="regular expressions: only cases in whose name one is found")
    add("--seconds", type=float, default=0.3, help="for each case")
    add("--budget", type=float, default=75.0, help="seconds after which no further case is begun")
    add("--out", type=Path, help="results as JSON, written after every case")
    add("--once", action="store_true", help="one call of each case, for a profiler")
    add("--counters", type=Path, metavar="FILE", help="count with ncu what misses in these results")
    options = parser.parse_args(arguments)
    if options.counters:
        return count(options.counters)
    if options.once:
        for case in CASES.values():
            if any(re.search(pattern, case.name) for pattern in options.only):
                calls_of(case, options.device)[0]()
                harness.synchronize(options.device)
        return 0
    return measure(options)


if __name__ == "__main__":
    raise SystemExit(main())
