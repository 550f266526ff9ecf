"""Times a training step of every method: python -m benchmarks.bench_methods.

    python -m benchmarks.bench_methods                 everything, into benchmarks/results/<device>.json
    python -m benchmarks.bench_methods --size tiny     checks that everything runs; writes only to --out
    python -m benchmarks.bench_methods --only trades   methods whose name contains that, into --out

A step is what precedes the optimizer: attack, forward passes, loss, and backward passes to the parameters, the model in
training mode.  Each method's step, robustkern's and the same in stock PyTorch (method_cases.py), is timed in turn with
the plain step and given as a multiple of it, beside a third of the number of passes that robustkern's makes.  Before
that, both losses are compared: attacks start at random points, so the values agree only roughly.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustkern as rk
import robustkern.models

from . import harness
from .method_cases import Method, methods
from .step_models import MODELS, Shape

Row = dict[str, Any]
_ROUGHLY = 0.25  # relative difference of two losses whose attacks started at different points


def models(size: str, device: str) -> list[tuple[str, int, Shape]]:
    """Name, batch and shape of the images."""
    if size == "tiny":
        return [("tiny PreAct-ResNet, BatchNorm", 4, (3, 8, 8))]
    batch = 128 if device == "cuda" else 32
    return [("small-cnn", 4 * batch, (3, 32, 32)), ("PreAct-ResNet-18 of width 32, BatchNorm", batch, (3, 32, 32))]


def measure(
    model: nn.Module, method: Method, x: Tensor, y: Tensor, interleaved: harness.Interleaved, seconds: float
) -> Row:
    """One method on one model."""
    parameters = list(model.parameters())

    def forget() -> None:
        for parameter in parameters:
            parameter.grad = None

    def plain() -> None:
        forget()
        torch.nn.functional.cross_entropy(model(x), y).backward(inputs=parameters)

    def stock() -> None:
        forget()
        method.stock(model, x, y).backward(inputs=parameters)

    def ours() -> None:
        forget()
        method.loss(model, x, y).backward(inputs=parameters)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    values = method.loss(model, x, y).total.item(), method.stock(model, x, y).item()
    if not abs(values[0] - values[1]) <= _ROUGHLY * abs(values[1]):
        raise SystemExit(f"{method.name}: the loss is {values[0]:.4g}, stock PyTorch's {values[1]:.4g}")
    timings = interleaved({"plain": plain, "stock": stock, "robustkern": ours}, seconds=3 * seconds, least=3)
    model.load_state_dict(state)  # so that the next method starts with the same running statistics
    times = {name: timing.ms for name, timing in timings.items()}
    ratio = timings["robustkern"].over(timings["plain"])
    return {
        "method": method.name,
        "passes": method.passes,
        "plain_ms": _round(times["plain"]),
        "stock_ms": _round(times["stock"]),
        "ms": _round(times["robustkern"]),
        "stock_ratio": _round(timings["stock"].over(timings["plain"])),
        "ratio": _round(ratio),
        "over_passes": _round(3 * ratio / method.passes),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--seconds", type=float, default=2.0, help="roughly, for each column of each row")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument(
        "--out", type=Path, help="results file; by default named after the device, none unless everything is measured"
    )
    options = parser.parse_args(arguments)
    everything = options.size == "full" and not options.only
    out = options.out or (harness.results_path(options.device) if everything else None)
    kept = harness.keep_pages() if options.device == "cpu" else None
    section: Row = {"stamp": {**harness.stamp(options.device), "pages_kept": kept}, "complete": False, "rows": []}
    interleaved = harness.Interleaved(options.device)
    started = time.perf_counter()
    known = models(options.size, options.device)
    for number, (name, batch, shape) in enumerate(known):
        torch.manual_seed(0)
        model = MODELS[name](shape) if name in MODELS else rk.models.create(name, 10, shape)
        model.to(options.device).train()
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(batch, *shape, generator=generator).to(options.device)
        y = torch.randint(10, (batch,), generator=generator).to(options.device)
        title = f"{name}, {'x'.join(map(str, (batch, *shape)))}"
        print(f"{title}  ({number + 1} of {len(known)}, {time.perf_counter() - started:.0f} s)", flush=True)
        for method in methods(model):
            if options.only not in method.name:
                continue
            row = {"model": title, **measure(model, method, x, y, interleaved, options.seconds)}
            section["rows"].append(row)
            print(
                f"  {method.name:38s} {row['ms']:9.2f} ms, {row['ratio']:6.2f}x (stock {row['stock_ratio']:6.2f}x, "
                f"passes {method.passes / 3:6.2f})",
                flush=True,
            )
        section["complete"] = number + 1 == len(known) and not options.only
        if out is not None:
            harness.write_section(out, "methods", section)
    print(f"{time.perf_counter() - started:.0f} s" + (f", written to {out}" if out else ""), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
