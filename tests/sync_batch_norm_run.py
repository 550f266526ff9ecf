"""One of the processes that test_sync_batch_norm.py compares with one; replaces SyncBatchNorm's CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

import robustkern as rk

SIZES = {"uneven": (3, 5), "empty": (0, 4), "one process": (4,)}


def spread(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 2))


def others(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.mean(others(x)), (x.var(others(x), unbiased=False) + eps).rsqrt()


def gather(x: Any, means: Tensor, invstds: Tensor, _: Any, __: Any, momentum: Any, eps: float, counts: Tensor) -> Any:
    share = (counts / counts.sum())[:, None]
    mean = (means * share).sum(0)
    variance = ((invstds.pow(-2) - eps + (means - mean).square()) * share).sum(0)
    return mean, (variance + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    y = (x - spread(mean, x)) * spread(invstd, x)
    return y if weight is None else y * spread(weight, x) + spread(bias, x)  # type: ignore[arg-type]


def reduce(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Any, *needs: bool) -> tuple[Tensor, ...]:
    sum_g, sum_gx = g.sum(others(x)), (g * (x - spread(mean, x))).sum(others(x))
    return sum_g, sum_gx, sum_gx * invstd, sum_g


def backward_elemt(
    g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sum_g: Tensor, sum_gx: Tensor, count: Any
) -> Tensor:
    m = count.sum()
    w = weight if weight is not None else torch.ones_like(mean)
    centred = g - spread(sum_g / m, x) - (x - spread(mean, x)) * spread(sum_gx / m * invstd**2, x)
    return spread(w * invstd, x) * centred


STAND_INS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


def data(samples: int, affine: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 2, 2, generator=generator, dtype=torch.float64)
    w, b = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.5
    v = torch.randn(samples, 3, 2, 2, generator=generator, dtype=torch.float64)
    return (x, v, w, b) if affine else (x, v)


def derivatives(normalize: Any, x: Tensor, v: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """First, second and third derivatives; the loss is a sum over samples, with terms in every gradient."""
    wrt = [x, *parameters]
    y = normalize(x, *parameters)
    first = torch.autograd.grad((y.sin() * v).sum(), wrt, create_graph=True)
    # A process's part of the parameters' gradients is its own, so the terms are linear in them.
    value = (first[0].square() * v.cos()).sum() + sum((g * (i + 2.0)).sum() for i, g in enumerate(first[1:]))
    second = torch.autograd.grad(value, wrt, create_graph=True)
    value = (second[0].square() * v.sin()).sum() + sum((g * (i + 1.0)).sum() for i, g in enumerate(second[1:]))
    third = torch.autograd.grad(value, wrt, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.detach() for g, x in zip((*first, *second, *third), wrt * 3)]


def main(case: str, affine: bool, rank: int, folder: Path) -> None:
    sizes = SIZES[case]
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=len(sizes))
    library = torch.library.Library("aten", "IMPL")
    for name, function in STAND_INS.items():
        library.impl(name, function, "CPU")
    x, v, *parameters = data(sum(sizes), affine)
    begin = sum(sizes[:rank])
    mine = slice(begin, begin + sizes[rank])
    weight_and_bias = [p.requires_grad_() for p in parameters]
    group = dist.group.WORLD

    def normalize(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return SyncBatchNorm.apply(x, w, b, None, None, 1e-5, 0.1, group, len(sizes))

    rk.install()
    found = derivatives(normalize, x[mine].requires_grad_(), v[mine], weight_and_bias)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), Path(sys.argv[4]))
