"""The input gradient of first layers on the CPU: PyTorch's and ours, over the forward of the better layout.

    python -m benchmarks.bench_first_layers [--only NAME ...] [--seconds S] [--limit 1.6]

All run in turns on one thread; shown are the medians over the rounds of the ratios of process times, and of ours the
quartiles.  Ends with status 1 if the lower quartile of ours is above the limit for float32 or float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import robustkern as rk

from . import harness

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# name: x, output channels, kernel, stride, padding
LAYERS = {
    "digits, 3x3 stride 2": ((128, 1, 28, 28), 32, 3, 2, 1),
    "CIFAR, 3x3 to 32": ((128, 3, 32, 32), 32, 3, 1, 1),
    "CIFAR, 3x3 to 64": ((128, 3, 32, 32), 64, 3, 1, 1),
    "ResNet, 7x7 stride 2": ((16, 3, 224, 224), 64, 7, 2, 3),
    "ConvNeXt, 4x4 patches": ((16, 3, 224, 224), 96, 4, 4, 0),
    "ViT-S, 16x16 patches": ((16, 3, 224, 224), 384, 16, 16, 0),
    "ViT-B, 16x16 patches": ((16, 3, 224, 224), 768, 16, 16, 0),
}


def work(x: Tensor, layer: tuple, layout: torch.memory_format) -> tuple[Callable[[], object], ...]:
    """The forward and the input gradient of a layer."""
    _, out, kernel, stride, padding = layer
    x = x.contiguous(memory_format=layout)
    w = torch.randn(out, x.shape[1], kernel, kernel).to(x.dtype).contiguous(memory_format=layout)
    g = torch.randn_like(torch.conv2d(x, w, None, stride, padding))
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
    return (
        lambda: torch.conv2d(x, w, None, stride, padding),
        lambda: torch.ops.aten.convolution_backward(g, x, w, None, *geometry),
    )


def clock(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure(layer: tuple, dtype: torch.dtype, seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """For each layout the rounds' ratios to the forward: PyTorch's input gradient, and ours."""
    x = torch.randn(layer[0]).to(dtype)
    both = {name: work(x, layer, layout) for name, layout in LAYOUTS.items()}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in LAYOUTS}
    for forward, gradient in both.values():
        forward()
        gradient()
    end = time.process_time() + seconds
    while len(found["contiguous"][0]) < 5 or time.process_time() < end:
        forwards = [clock(forward) for forward, _ in both.values()]
        for name, (_, gradient) in both.items():
            found[name][0].append(clock(gradient) / min(forwards))
            with rk.fused_double_backward():
                found[name][1].append(clock(gradient) / min(forwards))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names that contain one of these")
    parser.add_argument("--seconds", type=float, default=1.0, help="process time of a layer")
    parser.add_argument("--limit", type=float, default=1.6)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    harness.keep_pages()
    above = 0
    print("| first layer | dtype | layout | PyTorch / forward | ours / forward | quartiles | gain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, layer in LAYERS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for dtype in DTYPES:
            for layout, (stock, ours) in measure(layer, dtype, options.seconds).items():
                low, middle, high = statistics.quantiles(ours)
                above += low > options.limit and dtype != torch.bfloat16
                gain = statistics.median(s / o for s, o in zip(stock, ours, strict=True))
                kind = str(dtype).removeprefix("torch.")
                print(
                    f"| {name} | {kind} | {layout} | {statistics.median(stock):.2f} | {middle:.2f} "
                    f"| {low:.2f} to {high:.2f} | {gain:.1f}x |",
                    flush=True,
                )
    print(f"\n{above} above {options.limit}")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
