"""Runs every operator's samples on CUDA, all orders: what compute-sanitizer watches (python -m benchmarks.exercise)."""

from __future__ import annotations

import argparse

import torch

from robustkern.testing import derivatives
from tests.samples import samples_of

from .op_cases import OPS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    count = 0
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16):
            for sample in samples_of(op, device, dtype):
                x = sample.inputs[0]
                value = sample(impl="kernel")
                derivatives(lambda x, s=sample: s(x, impl="kernel"), x, torch.ones_like(value), torch.ones_like(x))
                count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} samples, three orders each")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
