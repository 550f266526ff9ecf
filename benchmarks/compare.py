"""Compares the speed of two trees: kernels and training steps of both builds, in turns.

    python -m benchmarks.compare ../other [--only layer_norm ViT] [--rounds 15] [--limit 1.02]

One process runs each tree; they take turns, with samples of equal work.  Both are started anew a few times, since the
place of a process's memory can make a difference of ten per cent.  Prints, for each case, the median and quartiles of
the rounds' ratios of process time, this tree over the other; status 1 if a first quartile is above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.02  # of process time, at least


def cases(size: str) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """Name, and what builds the work, from the benchmarks of the tree that this process runs."""
    from benchmarks import bench_double_backward, op_cases, step_cases

    for op in op_cases.specs(size, "cpu"):
        for order in op_cases.ORDERS[:3]:
            yield f"{op} {order}", lambda op=op, order=order: op.build("cpu").work("operator", order)  # type: ignore[misc]
    for node in bench_double_backward.specs(size):
        yield f"second backward: {node}", lambda node=node: bench_double_backward.Case(node, "cpu").work()  # type: ignore[misc]
    for step in step_cases.specs("tiny" if size == "tiny" else "full", "cpu"):
        yield f"step: {step}", lambda step=step: step_cases.Case(step, "cpu").step(step_cases.INSTALLED)  # type: ignore[misc]


def serve(size: str) -> None:
    """Answers each line, the number of a case and of calls, with the process time that they took."""
    import torch

    import robustkern
    from benchmarks import harness

    torch.set_num_threads(1)
    harness.keep_pages()
    build = list(cases(size))
    print(json.dumps([name for name, _ in build]), flush=True)
    number, work = -1, None
    for line in sys.stdin:
        wanted, calls = json.loads(line)
        if wanted != number:
            number, work = wanted, None  # never two at a time in memory
            name, make = build[number]
            with robustkern.fused_double_backward() if name.startswith("second") else nullcontext():
                work = make()
            work()
        assert work is not None
        begin = time.process_time()
        for _ in range(calls):
            work()
        print(json.dumps(time.process_time() - begin), flush=True)


class Worker:
    """A process of one tree."""

    def __init__(self, tree: Path, size: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVE, str(HERE / "benchmarks" / "compare.py"), size]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.names: list[str] = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *reason: object) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args!r} has ended")
        return json.loads(line)

    def seconds(self, name: str, calls: int) -> float:
        assert self.process.stdin is not None
        print(json.dumps([self.names.index(name), calls]), file=self.process.stdin, flush=True)
        return float(self._answer())


SERVE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compare", sys.argv[1])
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
compare.serve(sys.argv[2])
"""


def ratios(mine: Worker, other: Worker, name: str, rounds: int) -> list[float]:
    once = min(mine.seconds(name, 1), other.seconds(name, 1))
    calls = max(1, round(SAMPLE_SECONDS / max(once, 1e-6)))
    found = []
    for turn in range(rounds):
        taken = {worker: worker.seconds(name, calls) for worker in ((mine, other) if turn % 2 else (other, mine))}
        found.append(taken[mine] / taken[other])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a folder with another tree, built")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name contains one of these")
    parser.add_argument("--size", default="small", choices=("tiny", "small", "large"))
    parser.add_argument("--rounds", type=int, default=7, help="of each launch")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.02)
    options = parser.parse_args(arguments)
    found: dict[str, list[float]] = {}
    for _ in range(options.launches):
        with Worker(HERE, options.size) as mine, Worker(options.other.resolve(), options.size) as other:
            for name in mine.names:
                if name in other.names and (not options.only or any(part in name for part in options.only)):
                    found.setdefault(name, []).extend(ratios(mine, other, name, options.rounds))
    above = 0
    print("| case | this / other | quartiles |\n| --- | --- | --- |")
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values)
        above += low > options.limit
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    print(f"\n{above} above {options.limit}")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
