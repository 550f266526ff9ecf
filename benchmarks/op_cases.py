"""What is measured of each operator: its cases, the ways of computing them, and the bytes that must be moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import robustkern as rk
from robustkern._dtypes import accumulation_dtype
from robustkern.ops.row_norm import as_rows
from robustkern.testing import derivatives

from .harness import Work, differentiable_compilation

ORDERS = ("forward", "backward", "double_backward", "all")
PROVIDERS = ("eager", "compile", "reference", "robustkern", "operator")


@dataclass(frozen=True)
class Spec:
    """One case by name; `build` makes its tensors."""

    op: str
    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False

    @property
    def name(self) -> str:
        options = ", ".join(k if v is True else f"{k}={v:g}" for k, v in self.options.items())
        return options + (", channels_last" if self.channels_last else "")

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return "-".join(
            filter(None, (self.op, shape, str(self.dtype).removeprefix("torch."), self.name.replace(", ", "-")))
        )

    def build(self, device: str) -> Case:
        return OPS[self.op](self, device)


@dataclass
class Case:
    """The tensors of one case, and each provider's function of (x, *rows); `rows` have one entry for each row of x."""

    spec: Spec
    x: Tensor
    rows: tuple[Tensor, ...]
    grad: Tensor  # cotangent of the value
    u: Tensor  # cotangent of grad_x
    eager: Callable[..., Tensor]  # what a user of PyTorch writes
    reference: Callable[..., Tensor]
    robustkern: Callable[..., Tensor]
    operators: dict[str, Work]  # the bare kernels, without autograd
    traffic: dict[str, int]  # bytes: each input read once, each output written once
    flat: bool = False  # the second derivative in x is zero

    def work(self, provider: str, order: str, backend: str = "inductor") -> Work:
        """The call to be timed.  Everything that comes before it in the chain of derivatives is done here."""
        if provider == "operator":
            return self.operators[order]
        if provider == "compile" and order in ("double_backward", "all"):
            return self._compiled_chain(order == "all", backend)
        function = self.function(provider, backend)
        x, grad = self.x.detach().requires_grad_(), self.grad.detach().requires_grad_()
        if order == "forward":
            return lambda: function(x, *self.rows)
        if order == "backward":
            value = function(x, *self.rows)
            return lambda: torch.autograd.grad(value, x, self.grad, retain_graph=True)
        if order == "double_backward":
            (grad_x,) = torch.autograd.grad(function(x, *self.rows), x, grad, create_graph=True)
            return lambda: torch.autograd.grad(grad_x, (grad, x), self.u, retain_graph=True, allow_unused=True)
        return lambda: chain(function, x, grad, self.u, self.rows)

    def function(self, provider: str, backend: str = "inductor") -> Callable[..., Tensor]:
        if provider == "compile":
            return torch.compile(self.eager, backend=backend, dynamic=False)
        return {"eager": self.eager, "reference": self.reference, "robustkern": self.robustkern}[provider]

    def _compiled_chain(self, everything: bool, backend: str) -> Work:
        """One compiled function of x that starts from scratch, since a compiled backward cannot be differentiated."""

        def traced(x: Tensor, grad: Tensor, u: Tensor, *rows: Tensor) -> tuple[Tensor | None, ...]:
            results = chain(self.eager, x, grad, u, rows)
            # Detached: for an output with a graph, the compiler would derive a third order, which it cannot.
            return tuple(None if r is None else r.detach() for r in (results if everything else results[2:]))

        compiled = torch.compile(traced, backend=backend, dynamic=False)
        x, grad = self.x.detach().requires_grad_(), self.grad.detach().requires_grad_()

        def call() -> object:
            with differentiable_compilation():
                return compiled(x, grad, self.u, *self.rows)

        return call

    def results(self, provider: str, backend: str = "inductor") -> tuple[Tensor | None, ...]:
        """Value, gradient and both second derivatives, for comparison."""
        if provider == "compile":
            return self._compiled_chain(True, backend)()  # type: ignore[return-value]
        function = self.function(provider)
        return derivatives(lambda x: function(x, *self.rows), self.x, self.grad, self.u)


def chain(
    function: Callable[..., Tensor], x: Tensor, grad: Tensor, u: Tensor, rows: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Forward, backward and double backward."""
    value = function(x, *rows)
    (grad_x,) = torch.autograd.grad(value, x, grad, create_graph=True)
    return value, grad_x, *torch.autograd.grad(grad_x, (grad, x), u, allow_unused=True)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _row_norm(spec: Spec, device: str) -> Case:
    p, squared = float(spec.options["p"]), spec.options.get("squared", False)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    x = _normal(spec.shape, spec.dtype, device, 0).contiguous(memory_format=layout)
    u = _normal(spec.shape, spec.dtype, device, 1).contiguous(memory_format=layout)
    accumulation = accumulation_dtype(spec.dtype)
    grad = _normal(spec.shape[:1], accumulation, device, 2)
    weight = (
        torch.linspace(0.5, 2.0, spec.shape[1], dtype=accumulation, device=device)
        if spec.options.get("weight")
        else None
    )
    dims = tuple(range(1, x.dim()))

    def eager(x: Tensor) -> Tensor:
        a = x if weight is None else x * weight.to(x.dtype).view(-1, 1, 1)
        if squared:
            return a.to(accumulation).square().sum(dims)
        return torch.linalg.vector_norm(a, p, dims, dtype=accumulation)

    def reference(x: Tensor) -> Tensor:
        return rk.ops.row_norm(x, p, weight, squared=squared, impl="reference")

    def kernel(x: Tensor) -> Tensor:
        return rk.ops.row_norm(x, p, weight, squared=squared, impl="kernel")

    ops, (rows, inner) = torch.ops.robustkern, as_rows(x)
    u_rows, _ = as_rows(u)
    norm = ops.row_norm(rows, weight, inner, p, squared)
    flat = p in (1.0, math.inf)
    item, batch = x.nbytes, norm.nbytes
    return Case(
        spec, x, (), grad, u, eager, reference, kernel,
        _operators(
            lambda: ops.row_norm(rows, weight, inner, p, squared),
            lambda: ops.row_norm_backward(grad, rows, norm, weight, inner, p, squared),
            lambda: ops.row_norm_double_backward(u_rows, grad, rows, norm, weight, inner, p, squared),
        ),
        _traffic(item + batch, 2 * item + 2 * batch, (2 if flat else 3) * item + 3 * batch),
        flat,
    )  # fmt: skip


def _softmax_cross_entropy(spec: Spec, device: str) -> Case:
    batch, classes = spec.shape
    smoothing, soft = spec.options.get("label_smoothing", 0.0), spec.options.get("probabilities", False)
    logits = 3.0 * _normal(spec.shape, spec.dtype, device, 0)
    u = _normal(spec.shape, spec.dtype, device, 1)
    accumulation = accumulation_dtype(spec.dtype)
    grad = _normal((batch,), accumulation, device, 2)
    if soft:
        target = _normal(spec.shape, accumulation, device, 3).softmax(1).to(spec.dtype)
    else:
        target = torch.randint(
            classes, (batch,), generator=torch.Generator(device=device).manual_seed(3), device=device
        )

    def eager(z: Tensor, target: Tensor) -> Tensor:  # autocast, too, computes it in float32
        z = z.to(accumulation)
        target = target.to(accumulation) if soft else target
        return F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)

    def reference(z: Tensor, target: Tensor) -> Tensor:
        return rk.ops.softmax_cross_entropy(z, target, label_smoothing=smoothing, impl="reference")

    def kernel(z: Tensor, target: Tensor) -> Tensor:
        return rk.ops.softmax_cross_entropy(z, target, label_smoothing=smoothing, impl="kernel")

    ops, options = torch.ops.robustkern, (smoothing, 1.0, -100)
    _, statistics = ops.softmax_cross_entropy(logits, target, *options)
    item, row, read = logits.nbytes, grad.nbytes, statistics.nbytes + target.nbytes
    return Case(
        spec, logits, (target,), grad, u, eager, reference, kernel,
        _operators(
            lambda: ops.softmax_cross_entropy(logits, target, *options),
            lambda: ops.softmax_cross_entropy_backward(grad, logits, statistics, target, *options),
            lambda: ops.softmax_cross_entropy_double_backward(u, grad, logits, statistics, target, *options),
        ),
        _traffic(item + row + read, 2 * item + row + read, 3 * item + 2 * row + read),
    )  # fmt: skip


def _kl_divergence(spec: Spec, device: str) -> Case:
    p_logits, q_logits = (3.0 * _normal(spec.shape, spec.dtype, device, seed) for seed in (0, 3))
    u = _normal(spec.shape, spec.dtype, device, 1)
    accumulation = accumulation_dtype(spec.dtype)
    grad = _normal(spec.shape[:1], accumulation, device, 2)

    def eager(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = (z.to(accumulation).log_softmax(1) for z in (p, q))
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    def reference(p: Tensor, q: Tensor) -> Tensor:
        return rk.ops.kl_divergence(p, q, impl="reference")

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return rk.ops.kl_divergence(p, q, impl="kernel")

    ops, options = torch.ops.robustkern, (1.0, True, False)
    _, statistics = ops.kl_divergence(p_logits, q_logits, 1.0)
    saved = (p_logits, q_logits, statistics)
    item, row, read = p_logits.nbytes, grad.nbytes, statistics.nbytes
    return Case(
        spec, p_logits, (q_logits,), grad, u, eager, reference, kernel,
        _operators(
            lambda: ops.kl_divergence(p_logits, q_logits, 1.0),
            lambda: ops.kl_divergence_backward(grad, *saved, *options),
            lambda: ops.kl_divergence_double_backward(u, None, grad, *saved, *options),
        ),
        _traffic(2 * item + row + read, 3 * item + row + read, 4 * item + 2 * row + read),
    )  # fmt: skip


def _operators(forward: Work, backward: Work, double_backward: Work) -> dict[str, Work]:
    return {
        "forward": forward,
        "backward": backward,
        "double_backward": double_backward,
        "all": lambda: (forward(), backward(), double_backward()),
    }


def _traffic(*orders: int) -> dict[str, int]:
    return dict(zip(ORDERS, (*orders, sum(orders))))


OPS: dict[str, Callable[[Spec, str], Case]] = {
    "row_norm": _row_norm,
    "softmax_cross_entropy": _softmax_cross_entropy,
    "kl_divergence": _kl_divergence,
}


def specs(size: str, device: str) -> list[Spec]:
    """The cases of one size: "tiny" for tests, "small" within and "large" above any cache."""
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    images = {
        "tiny": (4, 3, 8, 8),
        "small": (128, 3, 32, 32),
        "large": (1024 if device == "cuda" else 192, 3, 224, 224),
    }[size]
    megabytes = {"tiny": 1e-2, "small": 1.0, "large": 512.0 if device == "cuda" else 128.0}[size]

    def norm(dtype: torch.dtype = f32, channels_last: bool = False, **options: Any) -> Spec:
        return Spec("row_norm", size, images, dtype, options, channels_last)

    def entropy(classes: int, dtype: torch.dtype = f32, **options: Any) -> Spec:
        rows = max(4, round(megabytes * 1e6 / (4 * classes)))
        return Spec("softmax_cross_entropy", size, (rows, classes), dtype, options)

    def divergence(classes: int, dtype: torch.dtype = f32) -> Spec:
        rows = max(4, round(megabytes * 1e6 / (4 * classes)))
        return Spec("kl_divergence", size, (rows, classes), dtype)

    if size == "tiny":
        return [norm(bf16, True, p=2.0, weight=True), entropy(10), divergence(10)]
    norms = [norm(p=2.0), norm(p=1.0), norm(p=2.0, squared=True), norm(p=math.inf), norm(bf16, p=1.0)]
    entropies = [entropy(1000), entropy(10), entropy(100), entropy(1000, bf16)]
    divergences = [divergence(1000), divergence(10), divergence(1000, bf16)]
    if size == "large":
        norms += [
            norm(p=1.0, weight=True),
            norm(channels_last=True, p=1.0, weight=True),
            norm(bf16, p=2.0),
            norm(f16, p=2.0),
            norm(p=3.0),
            norm(f64, p=2.0),
        ]
        entropies += [
            entropy(32000),
            entropy(1000, probabilities=True),
            entropy(1000, label_smoothing=0.1),
            entropy(1000, f16),
            entropy(32000, bf16),
        ]
    return norms + entropies + divergences
