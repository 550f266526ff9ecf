"""Times random_cotangents against what PyTorch offers: python -m benchmarks.bench_cotangents.

Orthonormal directions: torch.linalg.qr of a batched Gaussian matrix, with the signs that make it Haar-distributed.  The
sphere: normal numbers, divided by their norms.  Beside each figure stands the floor: the normal numbers that must be
drawn, at the cost of one of ours on all threads, and the flops of the reflections, at the cost of a matrix product's.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import robustkern as rk

from . import harness

Row = dict[str, Any]
_SIZES = {"tiny": [(4, 3, 3)], "full": [(128, 10, 1), (128, 10, 10), (128, 100, 3), (128, 100, 100), (8, 1000, 1000)]}


def qr(batch: int, classes: int, projections: int, device: str) -> Tensor:
    """sqrt(C) times K columns of Haar-distributed orthogonal matrices, as [K, B, C]."""
    q, r = torch.linalg.qr(torch.randn(batch, classes, projections, device=device))
    return (q * (math.sqrt(classes) * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1))).permute(2, 0, 1).contiguous()


def sphere(batch: int, classes: int, projections: int, device: str) -> Tensor:
    """sqrt(C) times directions on the sphere: the published recipe, which draws on the CPU."""
    v = torch.randn(projections, batch, classes)
    return (v * (math.sqrt(classes) / v.norm(dim=2, keepdim=True))).to(device)


def floor(law: str, batch: int, classes: int, projections: int, costs: tuple[float, float]) -> float:
    """The least milliseconds: for the normal numbers, and for the flops of the reflections."""
    normal, flop = costs
    if law == "sphere":
        return batch * projections * classes * normal
    numbers = projections * classes - projections * (projections - 1) // 2
    flops = sum(4 * (classes - k) * (projections - k) for k in range(projections))
    return batch * (numbers * normal + flops * flop)


def costs(device: str, interleaved: harness.Interleaved) -> tuple[float, float]:
    """Milliseconds of one normal number of ours, and of one flop of a matrix product."""
    outputs, seed = torch.zeros(64, 4096, device=device), torch.tensor([1], device=device)
    a = torch.randn(512, 512, device=device)
    numbers = lambda: rk.ops.random_cotangents(outputs, 1, law="gaussian", seed=seed, impl="kernel")  # noqa: E731
    timings = interleaved({"numbers": numbers, "product": lambda: a @ a}, seconds=1.0)
    return timings["numbers"].ms / outputs.numel(), timings["product"].ms / (2 * 512**3)


def measure(device: str, size: str, seconds: float) -> list[Row]:
    """A row for each law, shape and provider."""
    interleaved = harness.Interleaved(device)
    each = costs(device, interleaved)
    rows: list[Row] = []
    for batch, classes, projections in _SIZES[size]:
        for law, rival in (("orthonormal", qr), ("sphere", sphere)):
            outputs, seed = torch.zeros(batch, classes, device=device), torch.tensor([1], device=device)

            def ours(impl: str = "kernel") -> Tensor:
                return rk.ops.random_cotangents(outputs, projections, law=law, seed=seed, impl=impl)  # noqa: B023

            assert torch.allclose(ours(), ours("reference"), atol=1e-3), f"{law}, {classes} classes: wrong result"
            timings = interleaved(
                {"pytorch": lambda: rival(batch, classes, projections, device), "robustkern": ours},  # noqa: B023
                seconds=seconds,
            )
            least = floor(law, batch, classes, projections, each)
            case = {"law": law, "batch": batch, "classes": classes, "projections": projections}
            for provider, t in timings.items():
                figures = {"ms": round(t.ms, 5), "quartiles": [round(q, 5) for q in t.quartiles], "rounds": t.rounds}
                rows.append({**case, "provider": provider, **figures, "floor_ms": round(least, 5)})
            theirs, mine = timings["pytorch"].ms, timings["robustkern"].ms
            print(
                f"{law:12s} B = {batch:3d} C = {classes:4d} K = {projections:4d}: PyTorch {theirs:9.3f} ms, "
                f"robustkern {mine:8.3f} ms, {theirs / mine:5.1f}x; floor {least:.3f} ms",
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--seconds", type=float, default=2.0, help="roughly, for each case")
    parser.add_argument("--out", type=Path, help="results file; by default named after the device, none if tiny")
    options = parser.parse_args(arguments)
    out = options.out or (harness.results_path(options.device) if options.size == "full" else None)
    kept = harness.keep_pages() if options.device == "cpu" else None
    rows = measure(options.device, options.size, options.seconds)
    section = {"stamp": {**harness.stamp(options.device), "pages_kept": kept}, "complete": True, "rows": rows}
    if out is not None:
        harness.write_section(out, "cotangents", section)
        print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
