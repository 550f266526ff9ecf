"""Times training steps with a penalty on the Jacobian of the logits, by K random projections or exact.

    python -m benchmarks.bench_jacobian                 everything, into benchmarks/results/<device>.json: five minutes
    python -m benchmarks.bench_jacobian --size tiny     checks that everything runs; writes only to --out

The gradients of every column are compared with stock PyTorch's in float64, for the same projections, before anything is
timed.  The variance of the estimates is measured over many draws, beside what each law promises.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustkern as rk
from robustkern.ops.random_cotangents import LAWS

from . import harness
from .step_models import MODELS, Shape

Row = dict[str, Any]
Projections = int | str  # K or "exact"

PLAIN, OURS, RECIPE, ROWS, VMAP = "plain", "robustkern", "recipe", "rows", "vmap"
COUNTS = (1, 3, 10)
_SEED = 1
_DRAWS = 1000  # of each sample, for the variance


@dataclass(frozen=True)
class Spec:
    model: str
    batch: int
    shape: Shape = (3, 32, 32)
    channels_last: bool = False  # where the plain step is faster in it

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.model}, {'x'.join(map(str, (self.batch, *self.shape)))}{layout}"


def specs(size: str, device: str) -> list[Spec]:
    if size == "tiny":
        return [Spec("tiny PreAct-ResNet, BatchNorm", 4, (3, 8, 8)), Spec("tiny ConvNeXt", 4, (3, 8, 8), True)]
    batch = 128 if device == "cuda" else 32
    resnet, convnext = "PreAct-ResNet-18 of width 32, BatchNorm", "ConvNeXt blocks"
    return [Spec(resnet, batch), Spec(convnext, batch), Spec(convnext, batch, channels_last=True)]


def groups() -> list[tuple[Projections, tuple[str, ...]]]:
    """What is timed side by side."""
    return [*((count, (PLAIN, RECIPE, OURS, VMAP)) for count in COUNTS), ("exact", (PLAIN, ROWS, OURS))]


# Each column: from the model and x to outputs and ||J||_F^2 of each sample.


def _ours(x: Tensor, case: Case, projections: Projections) -> tuple[Tensor, Tensor]:
    outputs = case.model(x)
    generator = torch.Generator(case.device).manual_seed(_SEED)
    return outputs, rk.jacobian_norm(outputs, x, projections, generator=generator)  # type: ignore[call-overload]


def _recipe(x: Tensor, case: Case, projections: Projections) -> tuple[Tensor, Tensor]:
    """The published recipe: for each projection a direction on the sphere, drawn on the CPU, and one autograd.grad."""
    outputs = case.model(x)
    norm = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    for w in _directions(outputs, projections):
        (grad,) = torch.autograd.grad(outputs, x, w, create_graph=True)
        norm = norm + grad.flatten(1).square().sum(1) / int(projections)
    return outputs, norm


def _rows(x: Tensor, case: Case, projections: Projections) -> tuple[Tensor, Tensor]:
    outputs = case.model(x)
    norm = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    for c in range(outputs.shape[1]):
        (grad,) = torch.autograd.grad(outputs[:, c].sum(), x, create_graph=True)
        norm = norm + grad.flatten(1).square().sum(1)
    return outputs, norm


def _vmap(x: Tensor, case: Case, projections: Projections) -> tuple[Tensor, Tensor]:
    outputs, pullback = torch.func.vjp(case.model, x.detach())
    (grads,) = torch.func.vmap(pullback)(torch.stack(list(_directions(outputs, projections))))
    return outputs, grads.flatten(2).square().sum(2).mean(0)


def _directions(outputs: Tensor, projections: Projections) -> Iterator[Tensor]:
    """Independent directions, uniform on the sphere of radius sqrt(C)."""
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(int(projections)):
        v = torch.randn(outputs.shape, generator=generator)
        v = v * (outputs.shape[1] ** 0.5 / v.norm(dim=1, keepdim=True))
        yield v.to(device=outputs.device, dtype=outputs.dtype)


_NORMS = {OURS: _ours, RECIPE: _recipe, ROWS: _rows, VMAP: _vmap}


class Case:
    """A model with its batch; `step` is one of: forward, loss and the gradients of all parameters."""

    def __init__(self, spec: Spec, device: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.spec, self.device = spec, device
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        model = MODELS[spec.model](spec.shape).to(device=device, dtype=dtype, memory_format=layout)
        self.model: nn.Module = model.train()
        self.parameters = tuple(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(spec.batch, *spec.shape, generator=generator)
        self.x = x.to(device=device, dtype=dtype, memory_format=layout).requires_grad_()
        self.y = torch.randint(10, (spec.batch,), generator=generator).to(device)
        self.weight = self._balance()

    def step(self, provider: str, projections: Projections) -> Callable[[], Tensor]:
        """One training step of a column; it returns the gradients in one vector."""

        def step() -> Tensor:
            with installed(provider == OURS):
                self._total(provider, projections).backward(inputs=self.parameters)
            gradient = _flat(self.parameters, [parameter.grad for parameter in self.parameters])
            for parameter in self.parameters:
                parameter.grad = None
            return gradient

        return step

    def exact_gradient(self, cotangents: Tensor | None) -> Tensor:
        """The gradient in float64 by stock PyTorch, for given projections [K, B, C]; None: that of the plain step."""
        double = Case(self.spec, self.device, torch.float64)
        outputs = double.model(double.x)
        total = F.cross_entropy(outputs, double.y)
        for w in () if cotangents is None else cotangents.double():
            (grad,) = torch.autograd.grad(outputs, double.x, w, create_graph=True)
            total = total + self.weight * grad.flatten(1).square().sum(1).mean() / len(cotangents)
        grads = torch.autograd.grad(total, double.parameters, allow_unused=True)
        return _flat(double.parameters, grads)

    def cotangents(self, provider: str, projections: Projections) -> Tensor:
        """The cotangents w whose mean of ||J^T w||^2 a column computes."""
        outputs = torch.zeros(self.spec.batch, 10, device=self.device)
        if projections == "exact":
            return 10**0.5 * torch.eye(10, device=self.device)[:, None, :].expand(10, *outputs.shape)
        if provider == OURS:
            generator = torch.Generator(self.device).manual_seed(_SEED)
            return rk.reference.random_cotangents(outputs, int(projections), law="orthonormal", generator=generator)
        return torch.stack(list(_directions(outputs, projections)))

    def _total(self, provider: str, projections: Projections) -> Tensor:
        if provider == PLAIN:
            return F.cross_entropy(self.model(self.x.detach()), self.y)
        outputs, norm = _NORMS[provider](self.x, self, projections)
        return F.cross_entropy(outputs, self.y) + self.weight * norm.mean()

    def _balance(self) -> float:
        """The weight that makes the penalty as large as the loss, to one digit: neither hides an error in the other."""
        outputs = self.model(self.x)
        (grad,) = torch.autograd.grad(outputs, self.x, next(_directions(outputs, 1)))
        ratio = F.cross_entropy(outputs, self.y).detach() / grad.flatten(1).square().sum(1).mean()
        return float(f"{float(ratio):.0e}")


def _flat(parameters: Iterable[Tensor], grads: Iterable[Tensor | None]) -> Tensor:
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for p, grad in pairs])


@contextmanager
def installed(wanted: bool) -> Iterator[None]:
    if rk.is_installed():
        raise RuntimeError("robustkern is installed already: the stock columns would not be stock")
    if wanted:
        rk.install()
    try:
        yield
    finally:
        if wanted:
            rk.uninstall()


def measure(spec: Spec, device: str, interleaved: harness.Interleaved, seconds: float) -> list[Row]:
    """One row for each column and number of projections, with a figure or the reason why there is none."""
    case = Case(spec, device)
    rows: list[Row] = []
    for projections, providers in groups():
        steps: dict[str, Callable[[], Tensor]] = {}
        facts: dict[str, Row] = {}
        truth = Truth(case, projections)
        for provider in providers:
            step = case.step(provider, projections)
            try:
                error = truth.error(provider, step())
                facts[provider] = {"gradient_error": _round(error), "peak_bytes": harness.peak_memory(step, device)}
                steps[provider] = step
            except Exception as failure:
                facts[provider] = {"ms": None, "reason": harness.reason(failure)}
        timings = interleaved(steps, seconds=seconds * len(steps), least=3, equally_long=True)
        for provider in providers:
            row: Row = {"model": str(spec), "projections": projections, "provider": provider, **facts[provider]}
            if provider in timings:
                timing = timings[provider]
                row.update(ms=_round(timing.ms), quartiles=[_round(q) for q in timing.quartiles], rounds=timing.rounds)
                row["ratio"] = _round(timing.over(timings[PLAIN]))
            rows.append(row)
            _show(row)
    return rows


class Truth:
    """The float64 gradients of one number of projections, and how far stock float32 is from them."""

    def __init__(self, case: Case, projections: Projections) -> None:
        self.case, self.projections = case, projections
        self._exact: dict[str, Tensor] = {}
        self._stock_error = 0.0

    def error(self, provider: str, gradient: Tensor) -> float:
        """The gradient's relative error; AssertionError if it cannot be that of such a step.

        It must be right to half of the digits, or to four times stock PyTorch's own error where that is larger: an
        activation near its kink can fall on either side.
        """
        drawn = RECIPE if provider == VMAP else provider
        if drawn not in self._exact:
            cotangents = None if provider == PLAIN else self.case.cotangents(provider, self.projections)
            self._exact[drawn] = self.case.exact_gradient(cotangents)
        truth = self._exact[drawn]
        error = float((gradient.double() - truth).norm() / truth.norm())
        stock = provider in (PLAIN, RECIPE, ROWS)
        if stock:
            self._stock_error = max(self._stock_error, error)
        allowed = 0.1 if stock else max(torch.finfo(torch.float32).eps ** 0.5, 4 * self._stock_error)
        assert error <= allowed, f"{self.case.spec} {provider}: relative error {error:.2g} of the gradient"
        return error


def variances(spec: Spec, device: str) -> list[Row]:
    """For each law and K the relative standard deviation of one sample's estimate, measured and as promised.

    With A = J J^T of each sample known, an estimate is the mean of w^T A w: no backward pass is needed to see many.
    BatchNorm is in eval mode, where a sample's Jacobian is its own.
    """
    case = Case(spec, device)
    case.model.eval()
    outputs = case.model(case.x)
    jacobian = rk.input_jacobian(outputs, case.x, create_graph=False).flatten(2).double()
    a = jacobian @ jacobian.mT  # [B, C, C]
    classes, trace = a.shape[1], a.diagonal(dim1=1, dim2=2).sum(1)
    squares, diagonal = a.square().sum((1, 2)), a.diagonal(dim1=1, dim2=2).square().sum(1)
    sphere = 2 * classes / (classes + 2) * (squares - trace.square() / classes)
    one = {"gaussian": 2 * squares, "rademacher": 2 * (squares - diagonal)}
    generator = torch.Generator(device).manual_seed(_SEED)
    many = outputs.detach().repeat(_DRAWS, 1)
    rows = []
    for law in LAWS:
        for count in range(1, classes + 1):
            w = rk.ops.random_cotangents(many, count, law=law, generator=generator).double().unflatten(1, (_DRAWS, -1))
            estimates = torch.einsum("kdbc,bce,kdbe->db", w, a, w) / count
            measured = (estimates - trace).square().mean(0) / trace.square()
            predicted = one.get(law, sphere) / count / trace.square()
            if law == "orthonormal":
                predicted = predicted * (classes - count) / (classes - 1)
            found, promised = (_round(float(variance.mean().sqrt())) for variance in (measured, predicted))
            row = {"model": str(spec), "law": law, "projections": count, "measured": found, "predicted": promised}
            rows.append(row)
    return rows


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _show(row: Row) -> None:
    name = f"  K = {row['projections']!s:5s} {row['provider']:10s}"
    if row["ms"] is None:
        print(name, row["reason"], flush=True)
        return
    memory = f"{row['peak_bytes'] / 1e6:8.1f} MB"
    print(f"{name} {row['ms']:9.1f} ms {row['ratio']:7.3f}x {memory}  error {row['gradient_error']:.1e}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--seconds", type=float, default=1.5, help="roughly, for each column of each K")
    parser.add_argument("--out", type=Path, help="results file; by default named after the device, none if tiny")
    options = parser.parse_args(arguments)
    out = options.out or (harness.results_path(options.device) if options.size == "full" else None)
    kept = harness.keep_pages() if options.device == "cpu" else None
    stamp = {**harness.stamp(options.device), "pages_kept": kept}
    section: Row = {"stamp": stamp, "complete": False, "rows": [], "variances": []}
    interleaved = harness.Interleaved(options.device)
    started = time.perf_counter()
    known = specs(options.size, options.device)
    for number, spec in enumerate(known):
        print(f"{spec}  ({number + 1} of {len(known)}, {time.perf_counter() - started:.0f} s)", flush=True)
        section["variances"] += variances(spec, options.device)
        section["rows"] += measure(spec, options.device, interleaved, options.seconds)
        section["complete"] = number + 1 == len(known)
        if out is not None:
            harness.write_section(out, "jacobian", section)
    print(f"{time.perf_counter() - started:.0f} s" + (f", written to {out}" if out else ""), file=sys.stderr)
    return harness.report_wrong(section["rows"])


if __name__ == "__main__":
    raise SystemExit(main())
