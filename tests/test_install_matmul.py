"""Installed matrix products: values in all layouts, derivatives of every order, and who else sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import robustkern
from robustkern.double_backward import replaced_operators
from robustkern.testing import assert_as_accurate_as_reference

pytestmark = pytest.mark.skipif(
    "aten::mm" not in replaced_operators("cpu"), reason="this CPU's BLAS is not slower than oneDNN"
)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.t().contiguous().t(),
    "part of a larger one": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "part of columns": lambda t: torch.cat([t, t], 0).t().contiguous().t()[: t.shape[0]],
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}
# many rows; a sum over many; neither; with rests of every block
SHAPES = [(512, 64, 64), (64, 512, 64), (300, 300, 300), (1000, 391, 77), (77, 1000, 391), (391, 1000, 77)]


def in_backward(function: Callable[[], Tensor]) -> Tensor:
    """The result of a function inside a differentiable backward pass: products in a forward pass stay PyTorch's."""
    results = []
    start = torch.zeros((), requires_grad=True)
    end = start * 1.0
    end.register_hook(lambda _: results.append(function()))
    torch.autograd.grad(end, start, create_graph=True)
    return results[0]


def assert_near(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """Asserts that the result is a b up to float32's rounding of sums of terms of this size."""
    a, b = a.detach().double(), b.detach().double()
    assert actual.dtype == torch.float32
    assert actual.shape == (a.shape[0], b.shape[1])
    error = (actual.double() - a @ b).abs() / (a.abs() @ b.abs())
    assert error.max() <= 1e-6


@pytest.mark.parametrize("m, depth, n", SHAPES)
def test_values_in_every_layout(m, depth, n):
    torch.manual_seed(0)
    left, right = torch.randn(m, depth), torch.randn(depth, n)
    for of_left, of_right in product(LAYOUTS.values(), repeat=2):
        a, b = of_left(left).requires_grad_(), of_right(right)
        with robustkern.fused_double_backward():
            c = in_backward(lambda a=a, b=b: a @ b)
        assert type(c.grad_fn).__name__ != "MmBackward0", "not replaced"
        assert_near(c.detach(), a, b)
        assert c.is_contiguous()


def test_bits_do_not_depend_on_threads():
    torch.manual_seed(0)
    x, w, g = torch.randn(1500, 200, requires_grad=True), torch.randn(200, 300), torch.randn(1500, 300)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with robustkern.fused_double_backward():
                results.append((in_backward(lambda: x @ w), in_backward(lambda: x.t() @ g)))
    finally:
        torch.set_num_threads(before)
    for first, second in results[1:]:
        assert first.equal(results[0][0])
        assert second.equal(results[0][1])


def check(function: Callable[[torch.dtype], Sequence[Tensor]]) -> None:
    """Checks that installed float32 results are as close to float64 ones as stock results are, and not zero."""
    robustkern.uninstall()
    exact, stock = function(torch.float64), function(torch.float32)
    robustkern.install()
    for got, reference, want in zip(function(torch.float32), stock, exact, strict=True):
        assert_as_accurate_as_reference(got, reference, want)


@pytest.mark.parametrize("wanted", [w for w in product([False, True], repeat=3) if any(w)])
def test_second_derivatives(wanted):
    """Second derivatives of a linear layer, for every subset of its input, weight and cotangent."""
    torch.manual_seed(0)
    values = torch.randn(600, 96), torch.randn(96, 130) / 10, torch.randn(600, 130)

    def second(dtype: torch.dtype) -> Sequence[Tensor]:
        x, w, g = (v.to(dtype).requires_grad_(want or i < 2) for i, (v, want) in enumerate(zip(values, wanted)))
        grad_x, grad_w = torch.autograd.grad(x @ w, (x, w), g, create_graph=True)
        total = grad_x.pow(2).sum() + grad_w.sin().sum()
        return torch.autograd.grad(total, [t for t, want in zip((x, w, g), wanted) if want])

    check(second)


def test_third_derivative():
    torch.manual_seed(0)
    values = torch.randn(512, 64), torch.randn(64, 64) / 8

    def third(dtype: torch.dtype) -> Sequence[Tensor]:
        x, w = (v.to(dtype).requires_grad_() for v in values)
        y = (x @ w).pow(4).sum() / 100
        for _ in range(2):
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = grad.pow(2).sum() / 100
        return torch.autograd.grad(y, (x, w))

    check(third)


@pytest.mark.parametrize("projections", [1, 3])
def test_jacobian_penalties(projections):
    """Looped and folded; the products of the fold are larger than any of the network's own."""
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(1))

    def penalty(dtype: torch.dtype) -> Sequence[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 16))
        model, images = model.to(dtype), x.to(dtype).requires_grad_()
        outputs, generator = model(images), torch.Generator().manual_seed(3)
        value = robustkern.jacobian_norm(outputs, images, projections, generator=generator, reduction="mean")
        weights = [p for p in model.parameters() if p.dim() == 2]
        return torch.autograd.grad(value, weights)

    check(penalty)


def test_vmap_over_a_gradient():
    torch.manual_seed(0)
    values = torch.randn(600, 64), torch.randn(64, 64), torch.randn(3, 600, 64)

    def through_vmap(dtype: torch.dtype) -> Sequence[Tensor]:
        x, w, cotangents = (v.to(dtype) for v in values)
        x.requires_grad_(), w.requires_grad_()
        y = (x @ w).tanh()
        (many,) = torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, create_graph=True))(cotangents)
        return [many.detach(), *torch.autograd.grad(many.pow(2).sum(), (x, w))]

    check(through_vmap)


def test_operations_are_counted():
    x, w = torch.randn(600, 64, requires_grad=True), torch.randn(64, 64)
    robustkern.install()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad((x @ w).sum(), x, create_graph=True)
    assert counter.get_total_flops() == 2 * 2 * 600 * 64 * 64


def test_checkpoints():
    """They repeat the forward inside the backward, and expect to save what they saved at first."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
    x = torch.randn(600, 64, requires_grad=True)
    robustkern.install()
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        (grad,) = torch.autograd.grad(run(x).pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.pow(2).sum(), tuple(model.parameters())))
    for stored, computed in zip(*results):
        torch.testing.assert_close(stored, computed)


def test_plain_steps_and_float64_are_pytorchs():
    x, w = torch.randn(600, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    expected = torch.autograd.grad((x @ w).pow(2).sum(), (x, w))
    robustkern.install()
    y = x @ w
    assert type(y.grad_fn).__name__ == "MmBackward0"
    for want, got in zip(expected, torch.autograd.grad(y.pow(2).sum(), (x, w))):
        assert got.equal(want)
    assert type(in_backward(lambda: x.double() @ w.double()).grad_fn).__name__ == "MmBackward0"


def test_forward_mode_over_a_layer():
    """PyTorch's rule for tangents multiplies by tensors that have no memory, and by duals."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    x, v = torch.randn(512, 64), torch.randn(512, 64)

    def run(dtype: torch.dtype) -> list[Tensor]:
        network.to(dtype).zero_grad()
        at = x.to(dtype).requires_grad_()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(at, v.to(dtype))
            (grad,) = torch.autograd.grad(network(dual).sum(), at, create_graph=True)
            tangent = torch.autograd.forward_ad.unpack_dual(grad).tangent
        tangent.square().mean().backward()
        return [tangent.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    exact, stock = run(torch.float64), run(torch.float32)
    robustkern.install()
    for actual, s, e in zip(run(torch.float32), stock, exact, strict=True):
        assert_as_accurate_as_reference(actual, s, e)


def test_a_zero_without_memory_and_rows_that_overlap():
    torch.manual_seed(0)
    x, w = torch.randn(1024, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    robustkern.install()
    grads = torch.autograd.grad(x @ w.t(), [x, w], torch._efficientzerotensor(1024, 64), create_graph=True)
    assert not any(g.any() for g in grads)
    weight = torch.randn(1, 64).expand(64, 64)
    actual = in_backward(lambda: torch.mm(x, weight)).detach()
    stock, exact = torch.mm(x.detach(), weight.contiguous()), torch.mm(x.detach().double(), weight.double())
    assert_as_accurate_as_reference(actual, stock, exact)
