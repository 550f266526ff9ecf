"""LayerNorm and RMSNorm under `robustkern.install()`: what is special about them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustkern as rk


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).requires_grad_()
    )


def both(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor | tuple[Tensor, ...], ...]:
    """The results of a function without robustkern and with it."""
    stock = function()
    with rk.fused_double_backward():
        return stock, function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_has_stocks_bits(dtype, eps):
    x, weight = rows(7, 33, dtype=dtype), torch.linspace(0.5, 2, 33).to(dtype).requires_grad_()
    stock, ours = both(lambda: F.rms_norm(x, (33,), weight, eps))
    assert torch.equal(stock, ours)
    assert ours.dtype == dtype and ours.grad_fn.name() != stock.grad_fn.name()


def test_rms_norm_of_float32_weight():
    """A 16-bit input with a float32 weight, which PyTorch multiplies in float32."""
    x, weight = rows(5, 16, dtype=torch.bfloat16), torch.linspace(0.5, 2, 16).requires_grad_()
    stock, ours = both(lambda: F.rms_norm(x, (16,), weight))
    assert torch.equal(stock, ours)
    grads = torch.autograd.grad(ours.float().sin().sum(), (x, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


def test_rms_norm_first_backward_is_one_kernel():
    x, weight = rows(4, 8), torch.ones(8, dtype=torch.float64, requires_grad=True)
    with rk.fused_double_backward():
        y = F.rms_norm(x, (8,), weight)
        with torch.profiler.profile() as profile:
            torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    names = {event.name for event in profile.events()}
    assert "robustkern::layer_norm_backward" in names
    assert not names & {"aten::mul", "aten::pow", "aten::sum"}


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_rms_norm_refuses_wrong_shapes(shape):
    x = rows(2, 5)
    with pytest.raises(RuntimeError):
        F.rms_norm(x, shape)
    with rk.fused_double_backward(), pytest.raises(RuntimeError):
        F.rms_norm(x, shape)


def test_complex_input_stays_with_stock():
    x = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    try:
        expected = F.rms_norm(x, (4,), eps=1e-5)
    except RuntimeError as reason:
        pytest.skip(f"PyTorch itself: {reason}")
    with rk.fused_double_backward():
        assert torch.equal(F.rms_norm(x, (4,), eps=1e-5), expected)


def test_third_order_of_layer_norm_is_right():
    """PyTorch's own treats mean and deviation as constants there."""
    x = rows(3, 5)

    def second(t: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(F.layer_norm(t, (5,)).sin().sum(), t, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), t, create_graph=True)
        return again

    with rk.fused_double_backward():
        assert torch.autograd.gradcheck(second, (x,))


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_nan_stays_in_its_row(norm):
    x = rows(4, 6, dtype=torch.float32)
    with torch.no_grad():
        x[2, 3] = float("nan")
    with rk.fused_double_backward():
        (grad,) = torch.autograd.grad(norm(x, (6,)).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second[2].isnan().all() and not second[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_batched_cotangents(norm):
    """is_grads_batched keeps the graph of every cotangent's gradient."""
    x = rows(3, 6)
    with rk.fused_double_backward():
        y = norm(x, (6,))
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    for scope in (rk.fused_double_backward, contextlib.nullcontext):
        with scope():
            (batched,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, create_graph=True)
            loop = torch.stack([torch.autograd.grad(y, x, c, create_graph=True)[0] for c in cotangents])
        actual, expected = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (batched, loop))
        assert torch.allclose(batched, loop) and torch.allclose(actual, expected)


def test_plain_backward_is_stocks_own():
    """A step without a second derivative gives PyTorch's bits."""
    x, weight = rows(9, 40, dtype=torch.float32), torch.ones(40, requires_grad=True)
    bias = torch.zeros(40, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.layer_norm(x, (40,), weight, bias).sin().sum(), (x, weight, bias))

    stock, ours = both(run)
    assert all(torch.equal(a, b) for a, b in zip(stock, ours))
