"""Derivatives of first to third order of every operator and of small networks, installed over stock, at every size.

    python -m benchmarks.bench_orders [--only NAME ...] [--seconds S] [--limit 1.05]

Both run in turns on one thread; shown is the median over the rounds of the ratio of process times.  Ends with status 1
if a ratio is above the limit in three quarters of the rounds; third orders that PyTorch gets wrong are marked, and not
held to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustkern as rk

from . import harness

SIZES = ((4, 32), (32, 32), (128, 64), (512, 128), (2048, 128))
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (torch.tanh, torch.sigmoid, F.silu, F.gelu, F.mish, F.softplus, F.elu, F.hardswish, F.relu, F.leaky_relu)
}
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[1:]),
    "group_norm": lambda x: F.group_norm(x.view(x.shape[0], 8, -1), 4).flatten(1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
}
WRONG_IN_PYTORCH = ("layer_norm", "batch_norm")  # their third order
ACTIVATIONS = {"MLP of ReLU": nn.ReLU, "MLP of tanh": nn.Tanh, "MLP of GELU": nn.GELU}
DEPTHWISE = [(k, layout) for k in (3, 7, 11, 15, 31) for layout in (torch.contiguous_format, torch.channels_last)]


def derivative(function: Callable[[Tensor], Tensor], x: Tensor, order: int) -> None:
    value = function(x).square().sum()
    for k in range(1, order + 1):
        (grad,) = torch.autograd.grad(value, x, create_graph=k < order)
        value = grad.square().sum()


def cases() -> Iterator[tuple[str, str, int, Callable[[], None]]]:
    """Name, size, order and what to run."""
    for name, function in (ELEMENTWISE | ROWS).items():
        for shape in SIZES:
            x = torch.randn(shape).requires_grad_()
            for order in (1, 2, 3):
                yield name, "x".join(map(str, shape)), order, lambda f=function, x=x, k=order: derivative(f, x, k)
    for name, activation in ACTIVATIONS.items():
        for width in (32, 128, 512):
            network = nn.Sequential(nn.Linear(16, width), activation(), nn.Linear(width, width), activation())
            x = torch.randn(64, 16).requires_grad_()
            for order in (1, 2, 3):
                yield name, f"64x{width}", order, lambda f=network, x=x, k=order: derivative(f, x, k)
    for kernel, layout in DEPTHWISE:
        network = nn.Conv2d(32, 32, kernel, padding=kernel // 2, groups=32).to(memory_format=layout)
        x = torch.randn(2, 32, 32, 32).contiguous(memory_format=layout).requires_grad_()

        def penalty(network: nn.Module = network, x: Tensor = x) -> None:
            (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
            torch.autograd.grad(grad.square().sum(), [x, *network.parameters()])

        yield "depthwise convolution", f"{kernel}x{kernel} {str(layout).removeprefix('torch.')}", 2, penalty


def ratios(step: Callable[[], None], seconds: float) -> list[float]:
    """Installed over stock, one ratio for each round."""

    def clock(install: bool, calls: int) -> float:
        (rk.install if install else rk.uninstall)()
        begin = time.process_time()
        for _ in range(calls):
            step()
        return time.process_time() - begin

    clock(True, 1)
    calls = max(1, int(0.004 / max(clock(False, 1), 1e-6)))
    found, end = [], time.process_time() + seconds
    while len(found) < 9 or time.process_time() < end:
        order = (False, True) if len(found) % 2 else (True, False)
        taken = {install: clock(install, calls) for install in order}
        found.append(taken[True] / taken[False])
    rk.uninstall()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names that contain one of these")
    parser.add_argument("--seconds", type=float, default=0.2, help="process time of a case")
    parser.add_argument("--limit", type=float, default=1.05)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_pages()
    above = 0
    print("| operator | size | order | installed / stock |\n| --- | --- | --- | --- |")
    for name, size, order, step in cases():
        if options.only and not any(part in name for part in options.only):
            continue
        found = ratios(step, options.seconds)
        wrong = order == 3 and name in WRONG_IN_PYTORCH
        missed = statistics.quantiles(found)[0] > options.limit and not wrong
        above += missed
        remark = " (PyTorch's is wrong)" if wrong else " **above**" if missed else ""
        print(f"| {name} | {size} | {order} | {statistics.median(found):.2f}{remark} |", flush=True)
    print(f"\n{above} above {options.limit}")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
