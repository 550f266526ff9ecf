"""Times the second derivative of attention on the CPU: python -m benchmarks.bench_attention.

Forward, first derivatives, and the gradients of their squares in q, k, v and the cotangent, of 4,096 queries in all:
ours, PyTorch's MATH backend, and jax.nn.dot_product_attention, compiled, where jax can be imported.  The error is that
of all gradients against float64.  Memory is that of one head: of JAX what its compiler plans, else what the allocator
records.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk

from . import harness

Row = dict[str, Any]
Gradients = Callable[[], tuple[Tensor, ...]]
QUERIES, SIZE = 4096, 64
_LENGTHS = {"tiny": [16, 64], "full": [64, 256, 1024, 4096]}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def second(inputs: list[Tensor], installed: bool) -> tuple[Tensor, ...]:
    """The gradients in q, k, v and the cotangent of the squares of the first three's first derivatives."""
    q, k, v, cotangent = leaves = [t.detach().requires_grad_() for t in inputs]
    with rk.fused_double_backward() if installed else sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), cotangent, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)


def of_jax(inputs: list[Tensor]) -> tuple[Gradients, int]:
    """The same by JAX, compiled, and the bytes that it takes."""
    import jax

    def value(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        return (jax.nn.dot_product_attention(q, k, v) * cotangent).sum()

    def squares(*arguments: Any) -> Any:
        return sum((g**2).sum() for g in jax.grad(value, (0, 1, 2))(*arguments))

    arguments = [jax.numpy.asarray(t.transpose(1, 2).contiguous().numpy()) for t in inputs]  # heads are inside
    compiled = jax.jit(jax.grad(squares, (0, 1, 2, 3))).lower(*arguments).compile()
    planned = compiled.memory_analysis()

    def run() -> tuple[Tensor, ...]:
        results = jax.block_until_ready(compiled(*arguments))
        return tuple(torch.from_dlpack(r).transpose(1, 2) for r in results)

    return run, planned.temp_size_in_bytes + planned.output_size_in_bytes


def error(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    off = torch.stack([(a.double() - e).norm() for a, e in zip(actual, exact, strict=True)]).norm()
    return float(off / torch.stack([e.norm() for e in exact]).norm())


def measure(size: str, seconds: float, clock: Callable[[], float]) -> list[Row]:
    """A row for each length, dtype and provider."""
    interleaved, rows = harness.Interleaved("cpu", clock), []
    for length in _LENGTHS[size]:
        generator = torch.Generator().manual_seed(0)
        shape = (1, QUERIES // length if size == "full" else 2, length, SIZE)
        wide = [torch.randn(shape, generator=generator) for _ in range(4)]
        for name, dtype in _DTYPES.items():
            inputs = [t.to(dtype) for t in wide]
            exact = second([t.double() for t in inputs], installed=False)
            functions: dict[str, Gradients] = {
                "robustkern": partial(second, inputs, True),
                "MATH": partial(second, inputs, False),
            }
            head = [t[:, :1].contiguous() for t in inputs]
            peaks = {
                "robustkern": harness.peak_memory(partial(second, head, True), "cpu"),
                "MATH": harness.peak_memory(partial(second, head, False), "cpu"),
            }
            if dtype == torch.float32:
                try:
                    functions["JAX"], peaks["JAX"] = of_jax(inputs)[0], of_jax(head)[1]
                except ImportError:
                    print("without jax, which is not installed: pip install jax", file=sys.stderr)
            timings = interleaved(functions, seconds=seconds)
            for provider, t in timings.items():
                off = error(functions[provider](), exact)
                assert off < 20 * torch.finfo(dtype).eps, f"{provider}, {length} keys, {name}: error {off:.2g}"
                figures = {"ms": round(t.ms, 4), "quartiles": [round(q, 4) for q in t.quartiles], "rounds": t.rounds}
                case = {"keys": length, "heads": shape[1], "dtype": name, "provider": provider}
                rows.append({**case, **figures, "peak_bytes": peaks[provider], "error": float(f"{off:.2g}")})
                print(
                    f"{length:5d} keys, {name:8s} {provider:10s} {t.ms:10.3f} ms, {peaks[provider] / 1e6:8.1f} MB, "
                    f"error {off:.1e}",
                    flush=True,
                )
    return rows


def slopes(rows: list[Row]) -> dict[str, float]:
    """The power of the length that memory grows with between the two longest ones, by provider."""
    found = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider and row["dtype"] == "float32"]
        bytes_ratio, ratio = (own[-1][key] / own[-2][key] for key in ("peak_bytes", "keys"))
        found[provider] = round(math.log(bytes_ratio) / math.log(ratio), 3)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu",))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--seconds", type=float, default=10.0, help="roughly, for each case")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "process"), help="process: on a machine that is shared"
    )
    parser.add_argument("--out", type=Path, help="results file; by default named after the device, none if tiny")
    options = parser.parse_args(arguments)
    out = options.out or (harness.results_path("cpu") if options.size == "full" else None)
    kept = harness.keep_pages()
    clock = time.process_time if options.clock == "process" else time.perf_counter
    rows = measure(options.size, options.seconds, clock)
    stamp = {**harness.stamp("cpu"), "pages_kept": kept, "clock": options.clock}
    if "jax" in sys.modules:
        stamp["jax"] = sys.modules["jax"].__version__
    section = {"stamp": stamp, "complete": True, "rows": rows, "memory_slopes": slopes(rows)}
    print("at the end, memory grows with the length to the power of", section["memory_slopes"])
    if out is not None:
        harness.write_section(out, "attention", section)
        print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
