"""Every replaced operator, everywhere autograd goes: installed agrees with PyTorch wherever PyTorch works."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import robustkern as rk
import tests.installed
from tests.installed import Case

CASES = [
    (module.name, case)
    for module in sorted(pkgutil.iter_modules(tests.installed.__path__), key=lambda m: m.name)
    for case in importlib.import_module(f"tests.installed.{module.name}").CASES
]
over_cases = pytest.mark.parametrize(
    "case", [case for _, case in CASES], ids=[f"{m}-{c.name}".replace(" ", "_") for m, c in CASES]
)


def fresh(case: Case, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(t.to(device).requires_grad_() for t in case.inputs(dtype))


def normal_like(tensor: Tensor, seed: int) -> Tensor:
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(tensor)


def second(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], wrt: tuple[int, ...] | None = None, **options: Any
) -> list[Tensor]:
    """The gradients of a random functional of the gradients, in the inputs and in the output's cotangent."""
    wrt = tuple(range(len(inputs))) if wrt is None else wrt
    chosen = [inputs[i] for i in wrt]
    value = function(*inputs)
    grad = normal_like(value, 7).requires_grad_()
    first = torch.autograd.grad(value, chosen, grad, create_graph=True)
    mixed = sum((normal_like(g, 11 + i) * g).sum() for i, g in enumerate(first)) + value.sin().sum()
    found = torch.autograd.grad(mixed, (*chosen, grad), allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for t, g in zip((*chosen, grad), found)]


def assert_close(actual: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a - e).norm() <= tolerance * (1 + e.norm()), f"gradient {i}: {a} instead of {e}"


def stock_second(case: Case, inputs: tuple[Tensor, ...], wrt: tuple[int, ...] | None = None) -> list[Tensor]:
    assert not rk.is_installed()
    return second(case.stock or case.function, inputs, wrt)


@over_cases
def test_gradgradcheck(case, device):
    inputs = fresh(case, device)
    with rk.fused_double_backward():
        assert torch.autograd.gradgradcheck(case.function, inputs, gen_non_contig_grad_outputs=True, fast_mode=False)


@over_cases
def test_every_subset_of_inputs(case, device):
    inputs = fresh(case, device)
    for size in range(1, len(inputs) + 1):
        for wrt in itertools.combinations(range(len(inputs)), size):
            some = tuple(t.detach().requires_grad_(i in wrt) for i, t in enumerate(inputs))
            expected = stock_second(case, some, wrt)
            with rk.fused_double_backward():
                assert_close(second(case.function, some, wrt), expected)


@over_cases
def test_penalty_alone(case, device):
    """.backward() of a penalty leaves in .grad what PyTorch leaves, and it is not zero everywhere."""
    inputs = fresh(case, device)

    def grads(function: Callable[..., Tensor]) -> list[Tensor]:
        for t in inputs:
            t.grad = None
        (grad,) = torch.autograd.grad(function(*inputs).sin().sum(), inputs[0], create_graph=True)
        grad.square().sum().backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]

    expected = grads(case.stock or case.function)
    with rk.fused_double_backward():
        actual = grads(case.function)
    assert_close(actual, expected)
    assert any(bool(g.any()) for g in actual)


@over_cases
def test_third_order(case, device):
    inputs = fresh(case, device)

    def third(function: Callable[..., Tensor]) -> list[Tensor | None]:
        grads = [g for g in second(function, inputs, create_graph=True) if g.requires_grad]
        found = torch.autograd.grad(sum(g.cos().sum() for g in grads), inputs, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found)]

    expected = third(case.third or case.stock or case.function)
    with rk.fused_double_backward():
        assert_close(third(case.function), expected)


@over_cases
def test_retain_graph(case, device):
    inputs = fresh(case, device)
    with rk.fused_double_backward():
        value = case.function(*inputs).sin().sum()
        grads = torch.autograd.grad(value, inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        once = torch.autograd.grad(penalty, inputs, retain_graph=True)
        assert_close(torch.autograd.grad(penalty, inputs), once)


@over_cases
def test_batched_cotangents(case, device):
    """autograd.grad(is_grads_batched=True) is a loop over the cotangents, in both orders."""
    inputs = fresh(case, device)
    with rk.fused_double_backward():
        value = case.function(*inputs)
        cotangents = torch.stack([normal_like(value, seed) for seed in range(3)])
        loop = [torch.autograd.grad(value, inputs, c, create_graph=True) for c in cotangents]
        batched = torch.autograd.grad(value, inputs, cotangents, create_graph=True, is_grads_batched=True)
        assert_close(penalty_gradients(value, inputs, batched), penalty_gradients(value, inputs, stacked(loop)))

        (grad,) = torch.autograd.grad(value, inputs[0], cotangents[0], create_graph=True)
        u = torch.stack([normal_like(inputs[0], seed) for seed in range(3)])
        one = [torch.autograd.grad(grad, inputs, v, retain_graph=True, materialize_grads=True) for v in u]
        options = {"is_grads_batched": True, "materialize_grads": True}
        used = [
            t for t, g in zip(inputs, torch.autograd.grad(grad, inputs, u[0], True, allow_unused=True)) if g is not None
        ]
        assert_close(
            torch.autograd.grad(grad, used, u, **options),
            [p for t, p in zip(inputs, stacked(one)) if any(t is v for v in used)],
        )


def stacked(results: Any) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*results)]


def penalty_gradients(value: Tensor, inputs: tuple[Tensor, ...], grads: Any) -> list[Tensor]:
    total = sum(g.square().sum() for g in grads) + value.sin().sum()
    return list(torch.autograd.grad(total, inputs, retain_graph=True))


@over_cases
def test_vmap_over_grad(case, device):
    """torch.func.vmap over autograd.grad, wherever PyTorch's own result is that of a loop.

    PyTorch's rules for the backwards of BatchNorm and LayerNorm treat the statistics as constants: their second
    derivatives in x are wrong.
    """
    inputs = fresh(case, device)

    def error(function: Callable[..., Tensor]) -> float:
        value = function(*inputs)
        cotangents = torch.stack([normal_like(value, seed) for seed in range(3)])

        def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(value, inputs, cotangent, create_graph=True, retain_graph=True)

        expected = penalty_gradients(value, inputs, stacked([pull(c) for c in cotangents]))
        actual = penalty_gradients(value, inputs, torch.func.vmap(pull)(cotangents))
        return max(float((a - e).norm() / (1 + e.norm())) for a, e in zip(actual, expected))

    def error_of_stock() -> float:
        """The error of the function itself if PyTorch runs it, else of its stand-in."""
        try:
            return error(case.function)
        except RuntimeError:
            return error(case.stock or case.function)

    try:
        stock = error_of_stock()
    except RuntimeError as reason:
        pytest.skip(f"PyTorch itself: {reason}")
    if stock > 1e-9:
        pytest.skip(f"PyTorch's own second derivative is wrong by {stock:.1g} here")
    with rk.fused_double_backward():
        assert error(case.function) < 1e-9


@over_cases
def test_vmap_over_second_grad(case, device):
    """torch.func.vmap over the second autograd.grad."""
    inputs = fresh(case, device)
    with rk.fused_double_backward():
        value = case.function(*inputs)
        (grad,) = torch.autograd.grad(value, inputs[0], normal_like(value, 1), create_graph=True)

        def push(v: Tensor) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(grad, inputs, v, retain_graph=True, allow_unused=True)
            return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found))

        u = torch.stack([normal_like(inputs[0], seed) for seed in range(3)])
        assert_close(torch.func.vmap(push)(u), stacked([push(v) for v in u]))


@over_cases
def test_functorch(case, device):
    """torch.func.grad of torch.func.grad."""
    inputs = tuple(t.detach() for t in fresh(case, device))

    def penalty(function: Callable[..., Tensor]) -> Any:
        def norm(*args: Tensor) -> Tensor:
            return torch.func.grad(lambda x: function(x, *args[1:]).sin().sum())(args[0]).square().sum()

        return torch.func.grad(norm, argnums=tuple(range(len(inputs))))(*inputs)

    expected = penalty(case.stock or case.function)
    with rk.fused_double_backward():
        assert_close(penalty(case.function), expected)


@over_cases
def test_checkpoint(case, device):
    inputs = fresh(case, device)

    def run(function: Callable[..., Tensor], recompute: bool) -> list[Tensor]:
        value = checkpoint(function, *inputs, use_reentrant=False) if recompute else function(*inputs)
        (grad,) = torch.autograd.grad(value.sin().sum(), inputs[0], create_graph=True)
        return list(torch.autograd.grad(grad.square().sum() + value.sum(), inputs))

    expected = run(case.stock or case.function, False)
    with rk.fused_double_backward():
        assert_close(run(case.function, True), expected)


@over_cases
def test_saved_tensor_hooks(case, device):
    inputs = fresh(case, device)
    expected = stock_second(case, inputs)
    packed: list[int] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.numel())
        return t.clone()

    with rk.fused_double_backward(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert_close(second(case.function, inputs), expected)
    assert packed


@over_cases
def test_built_inside_and_run_outside(case, device):
    inputs = fresh(case, device)

    def first(function: Callable[..., Tensor]) -> Tensor:
        grads = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        return sum(g.square().sum() for g in grads)

    expected = torch.autograd.grad(first(case.stock or case.function), inputs)
    with rk.fused_double_backward():
        inside = first(case.function)
    assert_close(torch.autograd.grad(inside, inputs), expected)
    outside = first(case.stock or case.function)
    with rk.fused_double_backward():
        assert_close(torch.autograd.grad(outside, inputs), expected)


def traceable(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A penalty's gradients, without random numbers inside and with no graph left outside."""

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(function(*args).sin().sum(), args[0], create_graph=True)
        found = torch.autograd.grad(grad.square().sum(), args, allow_unused=True)
        return tuple(torch.zeros_like(a) if g is None else g.detach() for a, g in zip(args, found))

    return run


@over_cases
def test_make_fx(case, device):
    inputs = fresh(case, device)
    expected = traceable(case.stock or case.function)(*inputs)
    with rk.fused_double_backward():
        traced = make_fx(traceable(case.function))(*inputs)
    assert_close(traced(*inputs), expected)


@pytest.mark.long
@over_cases
def test_compile(case, device):
    inputs = fresh(case, device)
    expected = traceable(case.stock or case.function)(*inputs)
    with rk.fused_double_backward(), torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(traceable(case.function), backend="aot_eager", fullgraph=True)
        assert_close(compiled(*inputs), expected)


@over_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(case, dtype, device):
    """Errors at most twice PyTorch's own and 4 eps, and finite wherever float64 rounded is."""
    if not case.half:
        pytest.skip("no 16-bit form")
    inputs = fresh(case, device, dtype)
    exact = stock_second(case, tuple(t.detach().double().requires_grad_() for t in inputs))
    try:
        stock = stock_second(case, inputs)
    except RuntimeError as error:
        pytest.skip(f"PyTorch has no {dtype} kernel: {error}")
    with rk.fused_double_backward():
        actual = second(case.function, inputs)
    for i, (a, s, e) in enumerate(zip(actual, stock, exact, strict=True)):
        size = float(e.norm())
        error, yardstick = float((a.double() - e).norm()), float((s.double() - e).norm())
        yardstick = yardstick if yardstick == yardstick else 0.0
        assert a.isfinite().equal(e.to(dtype).isfinite()), f"gradient {i}"
        assert error <= 2 * yardstick + 4 * torch.finfo(dtype).eps * max(size, 1e-6), (
            f"gradient {i}: {error}, {yardstick}"
        )
