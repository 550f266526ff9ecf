"""What Python and C++ take for a penalised training step and for ten steps of PGD, whatever the kernels take.

    python -m benchmarks.bench_host [--seconds S] [--limit 1.33]

ResNet-18 of one channel on two images of 2x2 pixels: all of its operators, and next to nothing for them to compute.
oneDNN is off, whose convolutions take tens of microseconds however small; the replaced derivatives run however small.
Process time on one thread, all rows in turns.  A step that runs more nodes of autograd than the plain one may take
longer: it is held to `--limit` times the plain step's time for each of them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import robustkern as rk
from robustkern import _library, models
from robustkern.attacks import PGD

from . import harness

STEPS, EPS, STEP_SIZE = 10, 8 / 255, 2 / 255
_EVALUATED = "autograd::engine::evaluate_function"


def network() -> nn.Module:
    return models.PreActResNet(2, (1, 2, 2), (2, 2, 2, 2), widths=(1, 1, 2, 2))


class Batch:
    """Two images, and every step that is timed on it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = network()
        self.x = torch.rand(2, 1, 2, 2, generator=generator)
        self.y = torch.tensor([1, 0])
        self.penalty = rk.losses.GradientPenalty(weight=1.0, p=2.0, eps=1.0)
        self.pgd = PGD(EPS, STEP_SIZE, steps=STEPS)

    def _forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def plain(self) -> None:
        self._forget()
        F.cross_entropy(self.model(self.x), self.y).backward()

    def penalised(self) -> None:
        self._forget()
        x = self.x.clone().requires_grad_()
        loss = F.cross_entropy(self.model(x), self.y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        norm = grad.flatten(1).norm(dim=1)
        (loss.mean() + norm.mean()).backward(inputs=list(self.model.parameters()))

    def gradient_penalty(self) -> None:
        self._forget()
        self.penalty(self.model, self.x, self.y).backward(inputs=self.model.parameters())

    def plain_attack(self) -> None:
        """As tutorials write it: the last iterate, looked at once, and no checks."""
        adversary = (self.x + torch.empty_like(self.x).uniform_(-EPS, EPS)).clamp_(0, 1)
        self.model.eval().requires_grad_(False)
        for _ in range(STEPS):
            adversary.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(self.model(adversary), self.y), adversary)
            adversary = adversary.detach() + STEP_SIZE * grad.sign()
            adversary = torch.min(torch.max(adversary, self.x - EPS), self.x + EPS).clamp_(0, 1)
        with torch.no_grad():
            self.model(adversary)
        self.model.train().requires_grad_(True)

    def attack(self) -> None:
        self.pgd(self.model, self.x, self.y)


# Name: method, installed, the row that it is compared with.
ROWS: dict[str, tuple[str, bool, str]] = {
    "plain step": ("plain", False, "plain step"),
    "plain step, installed": ("plain", True, "plain step"),
    "penalised step": ("penalised", False, "plain step"),
    "penalised step, installed": ("penalised", True, "plain step"),
    "GradientPenalty": ("gradient_penalty", False, "plain step"),
    "GradientPenalty, installed": ("gradient_penalty", True, "plain step"),
    "ten PGD steps by hand": ("plain_attack", False, "ten PGD steps by hand"),
    "PGD(steps=10)": ("attack", False, "ten PGD steps by hand"),
    "PGD(steps=10), installed": ("attack", True, "ten PGD steps by hand"),
}


def under(install: bool, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        (rk.install if install else rk.uninstall)()
        step()

    return run


def nodes(step: Callable[[], None]) -> int:
    """How many nodes of autograd a step runs."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return sum(event.name.startswith(_EVALUATED) for event in seen.events() or [])


def milliseconds(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Process time of each step, one of every round."""

    def clock(step: Callable[[], None], calls: int) -> float:
        begin = time.process_time()
        for _ in range(calls):
            step()
        return 1e3 * (time.process_time() - begin) / calls

    calls = {}
    for name, step in steps.items():
        clock(step, 3)
        calls[name] = max(1, round(20 / clock(step, 2)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(samples["plain step"]) < 5 or time.perf_counter() < end:
            for name, step in steps.items():
                samples[name].append(clock(step, calls[name]))
    finally:
        gc.enable()
    return samples


def measure(seconds: float) -> list[dict[str, Any]]:
    batch = Batch()
    steps = {name: under(install, getattr(batch, method)) for name, (method, install, _) in ROWS.items()}
    extension = _library.aten_extension()
    before = extension.however_small(True) if extension else False
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            counts = {name: nodes(step) for name, step in steps.items()}
            samples = milliseconds(steps, seconds)
    finally:
        rk.uninstall()
        if extension:
            extension.however_small(before)
    found = []
    for name, (_, _, yardstick) in ROWS.items():
        ratio = statistics.median(a / b for a, b in zip(samples[name], samples[yardstick], strict=True))
        each = ratio * counts[yardstick] / counts[name]
        found.append({"name": name, "ms": min(samples[name]), "nodes": counts[name], "ratio": ratio, "each": each})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="in all")
    parser.add_argument("--limit", type=float, default=4 / 3, help="of ours, for each node, over PyTorch's plain step")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_pages()
    above = []
    print(
        "| step | host ms | nodes run | over plain | over plain, for as many nodes |\n| --- | --- | --- | --- | --- |"
    )
    for row in measure(options.seconds):
        ours = "installed" in row["name"] or row["name"].startswith(("GradientPenalty", "PGD"))
        if ours and row["each"] > options.limit:
            above.append(row["name"])
        print(
            f"| {row['name']} | {row['ms']:.2f} | {row['nodes']} | {row['ratio']:.2f} | {row['each']:.2f}"
            f"{' **above**' if row['name'] in above else ''} |",
            flush=True,
        )
    print(f"\n{len(above)} above {options.limit:.2f}")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
