"""Times what an attack adds to the network's passes: python -m benchmarks.bench_attacks.

    python -m benchmarks.bench_attacks                 everything, into benchmarks/results/<device>.json: five minutes
    python -m benchmarks.bench_attacks --size tiny     checks that everything runs; writes only to --out

A pass is one forward and one input gradient of the model in eval mode, without parameter gradients.  An attack's row
gives its time over that of its passes, measured in turn, which is only as precise as the machine is quiet; and what it
adds to each pass, measured on a model that costs next to nothing.  Rows of operators give the time of attack_step,
attack_start and margin_loss, that of the same in PyTorch's own operators, and the bytes that must be moved.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustkern as rk
import robustkern.models
from robustkern.attacks import APGD, FGSM, NFGSM, PGD, attacked

from . import harness
from .step_models import MODELS, Shape

Row = dict[str, Any]
EPS = 8 / 255
_STEPS = 4


def models(size: str, device: str) -> list[tuple[str, int, Shape]]:
    """Name, batch and shape of the images."""
    if size == "tiny":
        return [("tiny PreAct-ResNet, BatchNorm", 4, (3, 8, 8))]
    batch = 128 if device == "cuda" else 32
    return [("PreAct-ResNet-18 of width 32, BatchNorm", batch, (3, 32, 32)), ("small-cnn", batch, (3, 32, 32))]


def stock_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD as written by hand: as many passes, PyTorch's operators, no best iterate."""
    adversary = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(_STEPS):
        adversary = adversary.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adversary), y, reduction="sum"), adversary)
        with torch.no_grad():
            adversary = adversary + EPS / 4 * grad.sign()
            adversary = torch.min(torch.max(adversary, x - EPS), x + EPS).clamp(0, 1)
    return adversary.detach()


def attacks(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Callable[[], object], int, int]]:
    """Each attack, with the number of its passes and of its further forwards."""
    last = {"steps": _STEPS}
    return {
        "stock PGD": (lambda: stock_pgd(model, x, y), _STEPS, 0),
        "PGD": (lambda: PGD(EPS, **last)(model, x, y), _STEPS, 1),
        "PGD, l2": (lambda: PGD(0.5, norm="l2", **last)(model, x, y), _STEPS, 1),
        "PGD, l1": (lambda: PGD(12.0, norm="l1", coordinates=30, **last)(model, x, y), _STEPS, 1),
        "PGD, dlr": (lambda: PGD(EPS, loss="dlr", **last)(model, x, y), _STEPS, 1),
        "APGD": (lambda: APGD(EPS, **last)(model, x, y), _STEPS, 1),
        "FGSM": (lambda: FGSM(EPS)(model, x, y), 1, 0),
        "N-FGSM": (lambda: NFGSM(EPS)(model, x, y), 1, 0),
    }


def measure_attacks(
    name: str, batch: int, shape: Shape, device: str, interleaved: harness.Interleaved, seconds: float
) -> list[Row]:
    """The attacks on one model."""
    torch.manual_seed(0)
    model = rk_model(name, shape).to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # so that passes and stock code are spared parameter gradients, too
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, *shape, generator=generator).to(device)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    with attacked(model), torch.no_grad():
        y = model(x).argmax(1)  # every sample is classified correctly, so none is left out

    one_pass, forward = passes_of(model, x, y)
    free = Free().eval()
    free_pass, free_forward = passes_of(free, x, y)
    rows: list[Row] = []
    free_attacks = attacks(free, x, y)
    for attack, (call, passes, forwards) in attacks(model, x, y).items():
        timings = interleaved({"pass": one_pass, "forward": forward, attack: call}, seconds=3 * seconds, least=3)
        needed = passes * timings["pass"].ms + forwards * timings["forward"].ms
        ms = timings[attack].ms
        bare = interleaved(
            {"pass": free_pass, "forward": free_forward, attack: free_attacks[attack][0]}, seconds=seconds / 4, least=3
        )
        added = (bare[attack].ms - passes * bare["pass"].ms - forwards * bare["forward"].ms) / passes
        # An attack that needs p passes and f forwards may cost (p + f forward/pass) passes.
        row = {"model": f"{name}, {'x'.join(map(str, (batch, *shape)))}", "attack": attack, "passes": passes}
        row.update(forwards=forwards, pass_ms=_round(timings["pass"].ms), ms=_round(ms), ratio=_round(ms / needed))
        row.update(added_ms=_round(added), added=_round(added / timings["pass"].ms))
        rows.append(row)
        share = f"adds {added:.3f} ms to each, {added / timings['pass'].ms:.1%}"
        print(f"  {attack:10s} {ms:9.2f} ms, {ms / needed:6.3f} of its passes; {share}", flush=True)
    return rows


class Free(nn.Module):
    """A model that costs next to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


def passes_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """One forward with input gradient, and one forward."""

    def one_pass() -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)

    def forward() -> object:
        with torch.no_grad():
            return model(x)

    return one_pass, forward


def rk_model(name: str, shape: Shape) -> nn.Module:
    """A model of the tables, or one of robustkern's by its name."""
    return MODELS[name](shape) if name in MODELS else rk.models.create(name, 10, shape)


def operators(shape: tuple[int, ...], device: str) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    """robustkern's call, PyTorch's, and the bytes that must be moved."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device)
    adversary = x.clone()
    logits = torch.randn(shape[0], 10, generator=generator).to(device).requires_grad_()
    target = torch.randint(10, shape[:1], generator=generator).to(device)
    seed = torch.tensor([1], device=device)
    dims = tuple(range(1, len(shape)))

    def stock_linf() -> object:
        return torch.min(torch.max(adversary + EPS / 4 * grad.sign(), x - EPS), x + EPS).clamp(0, 1)

    def stock_l2() -> object:
        moved = adversary + 0.1 * grad / torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
        difference = moved - x
        norm = torch.linalg.vector_norm(difference, dim=dims, keepdim=True)
        return (x + difference * (0.5 / norm).clamp(max=1.0)).clamp(0, 1)

    def stock_start() -> object:
        return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)

    def stock_dlr() -> object:
        ordered, order = logits.sort(dim=1)
        right = (order[:, -1] == target).float()
        own = logits.gather(1, target[:, None]).squeeze(1)
        other = ordered[:, -2] * right + ordered[:, -1] * (1 - right)
        return torch.autograd.grad(((other - own) / (ordered[:, -1] - ordered[:, -3] + 1e-12)).sum(), logits)

    def step(norm: str, eps: float, size: float, coordinates: int = 1) -> Callable[[], object]:
        return lambda: rk.ops.attack_step(
            adversary, x, grad, eps=eps, step_size=size, norm=norm, coordinates=coordinates, impl="kernel"
        )

    def dlr() -> object:
        return torch.autograd.grad(rk.ops.margin_loss(logits, target, kind="dlr", impl="kernel").sum(), logits)

    def l1_reference() -> object:
        return rk.ops.attack_step(
            adversary.clone(), x, grad, eps=12.0, step_size=2.0, norm="l1", coordinates=30, impl="reference"
        )

    return {
        "attack_step, linf": (step("linf", EPS, EPS / 4), stock_linf, 4 * x.nbytes),
        "attack_step, l2": (step("l2", 0.5, 0.1), stock_l2, 4 * x.nbytes),
        "attack_step, l1": (step("l1", 12.0, 2.0, 30), l1_reference, 4 * x.nbytes),
        "attack_start, linf": (lambda: rk.ops.attack_start(x, eps=EPS, seed=seed), stock_start, 2 * x.nbytes),
        "margin_loss, dlr": (dlr, stock_dlr, 3 * logits.nbytes),
    }


def measure_operators(
    shape: tuple[int, ...], device: str, interleaved: harness.Interleaved, seconds: float
) -> list[Row]:
    """The operators on one batch, beside PyTorch's."""
    rows: list[Row] = []
    copy = harness.Copy(device, 1 << 16 if shape[0] < 32 else None)
    for name, (ours, stock, nbytes) in operators(shape, device).items():
        timings = interleaved({"copy": copy, "robustkern": ours, "stock": stock}, seconds=3 * seconds, least=3)
        bandwidth = copy.gb_per_s(timings["copy"])
        for provider in ("robustkern", "stock"):
            ms = timings[provider].ms
            rate = nbytes / ms * 1e-6
            row = {"op": name, "shape": list(shape), "provider": provider, "ms": _round(ms), "bytes": nbytes}
            rows.append({**row, "gb_per_s": _round(rate), "of_copy": _round(rate / bandwidth)})
        ours_ms, stock_ms = timings["robustkern"].ms, timings["stock"].ms
        share = nbytes / ours_ms * 1e-6 / bandwidth
        print(f"  {name:20s} {ours_ms:8.3f} ms, stock {stock_ms:8.3f} ms; {share:5.2f} of copy", flush=True)
    return rows


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--seconds", type=float, default=5.0, help="roughly, for each column of each row")
    parser.add_argument("--out", type=Path, help="results file; by default named after the device, none if tiny")
    options = parser.parse_args(arguments)
    out = options.out or (harness.results_path(options.device) if options.size == "full" else None)
    kept = harness.keep_pages() if options.device == "cpu" else None
    stamp = {**harness.stamp(options.device), "pages_kept": kept}
    section: Row = {"stamp": stamp, "complete": False, "attacks": [], "operators": []}
    interleaved = harness.Interleaved(options.device)
    started = time.perf_counter()
    batches = [(4, 3, 8, 8)] if options.size == "tiny" else [(32, 3, 32, 32), (256, 3, 32, 32)]
    for shape in batches:
        print("x".join(map(str, shape)), flush=True)
        section["operators"] += measure_operators(shape, options.device, interleaved, options.seconds / 4)
    known = models(options.size, options.device)
    for number, (name, batch, size) in enumerate(known):
        print(f"{name}  ({number + 1} of {len(known)}, {time.perf_counter() - started:.0f} s)", flush=True)
        section["attacks"] += measure_attacks(name, batch, size, options.device, interleaved, options.seconds)
        section["complete"] = number + 1 == len(known)
        if out is not None:
            harness.write_section(out, "attacks", section)
    print(f"{time.perf_counter() - started:.0f} s" + (f", written to {out}" if out else ""), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
