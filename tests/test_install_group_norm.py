"""GroupNorm under `robustkern.install()`: what is special about it."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustkern as rk


@pytest.fixture
def fused():
    with rk.fused_double_backward():
        yield


def image(*shape: int, dtype: torch.dtype = torch.float64, last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_forward_and_plain_backward_are_stocks_own(last):
    """A step without a second derivative gives PyTorch's bits."""
    x, weight = image(2, 6, 5, 4, dtype=torch.float32, last=last), torch.ones(6, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        y = F.group_norm(x, 3, weight, None)
        return (y.detach(), *torch.autograd.grad(y.sin().sum(), (x, weight)))

    stock = run()
    with rk.fused_double_backward():
        ours = run()
    assert all(torch.equal(a, b) for a, b in zip(ours, stock))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_layout_is_kept(last, fused):
    """Both results of the second backward lie in memory as the image does: nothing is copied between layouts."""
    x = image(2, 8, 4, 3, last=last)
    g = torch.randn_like(x).requires_grad_()
    (grad,) = torch.autograd.grad(F.group_norm(x, 2), x, g, create_graph=True)
    results = torch.autograd.grad(grad, (x, g), torch.randn_like(x))
    assert all(t.stride() == x.stride() for t in (grad, *results))


def test_last_backward_of_a_penalised_step_of_channels_last_images():
    """It runs the kernel of the first backward, for every subset of gradients, and gives PyTorch's gradients."""
    weight, bias = (torch.randn(6, dtype=torch.float64).requires_grad_() for _ in range(2))

    def run(wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        x = image(2, 6, 5, 4, last=True)
        y = F.group_norm(x, 3, weight, bias).sin().sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        given = {"x": x, "weight": weight, "bias": bias}
        return torch.autograd.grad(y + grad.square().sum(), [given[name] for name in wanted])

    for wanted in (("x", "weight", "bias"), ("x",), ("weight",), ("bias",), ("x", "bias")):
        stock = run(wanted)
        with rk.fused_double_backward(), torch.profiler.profile() as profile:
            ours = run(wanted)
        for a, b in zip(ours, stock, strict=True):
            torch.testing.assert_close(a, b)
            assert a.any()
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["robustkern::group_norm_backward"] == 2
        assert "aten::native_group_norm_backward" not in calls


@pytest.mark.parametrize("needed", ["weight", "bias", "both"])
def test_parameters_alone_of_channels_last_images(needed, fused):
    """Here PyTorch's backward would write to a gradient that it has not allocated; ours is used instead."""
    x = image(2, 4, 3, 3, last=True).detach()
    weight = torch.ones(4, dtype=x.dtype, requires_grad=needed != "bias")
    bias = torch.zeros(4, dtype=x.dtype, requires_grad=needed != "weight")
    wanted = [t for t in (weight, bias) if t.requires_grad]
    actual = torch.autograd.grad(F.group_norm(x, 2, weight, bias).sin().sum(), wanted)
    expected = torch.autograd.grad(F.group_norm(x.contiguous(), 2, weight, bias).sin().sum(), wanted)
    assert all(torch.allclose(a, e) for a, e in zip(actual, expected))


def test_gradients_of_the_statistics(fused):
    """torch.native_group_norm also returns mean and 1 / deviation, and they can be differentiated."""
    x = image(2, 4, 3)

    def statistics(t: Tensor) -> Tensor:
        y, mean, rstd = torch.native_group_norm(t, None, None, 2, 4, 3, 2, 1e-5)
        return torch.cat([y.flatten(), mean.flatten(), rstd.flatten()])

    assert torch.autograd.gradcheck(statistics, (x,))
    assert torch.autograd.gradgradcheck(statistics, (x,))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_batched_cotangents(last):
    """is_grads_batched with create_graph, which PyTorch's own GroupNorm refuses with a wrong message."""
    x = image(2, 4, 3, 3, last=last)
    with rk.fused_double_backward():
        y = F.group_norm(x, 2)
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    for scope in (rk.fused_double_backward, contextlib.nullcontext):
        with scope():
            (batched,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, create_graph=True)
            loop = torch.stack([torch.autograd.grad(y, x, c, create_graph=True)[0] for c in cotangents])
        actual, expected = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (batched, loop))
        assert torch.allclose(batched, loop) and torch.allclose(actual, expected)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_nan_stays_in_its_group(last, fused):
    x = image(2, 4, 3, 3, dtype=torch.float32, last=last)
    with torch.no_grad():
        x[1, 2, 0, 0] = float("nan")
    (grad,) = torch.autograd.grad(F.group_norm(x, 2).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    touched = second.isnan()
    assert touched[1, 2:].all()
    assert not touched[0].any() and not touched[1, :2].any()


def test_bfloat16_with_float32_weight(fused):
    """Mixed types, as autocast leaves them: the weight's gradient has the weight's type."""
    x = image(2, 4, 5, dtype=torch.bfloat16)
    weight = torch.ones(4, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    (grad,) = torch.autograd.grad(F.group_norm(x, 2, weight, bias).float().sin().sum(), x, create_graph=True)
    assert grad.dtype == torch.bfloat16
    grads = torch.autograd.grad(grad.float().square().sum(), (x, weight))
    assert [t.dtype for t in grads] == [torch.bfloat16, torch.float32]
