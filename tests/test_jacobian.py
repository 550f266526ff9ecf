"""Jacobian norms, the Jacobian, its largest singular value: what they compute, and gradients on every path."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustkern
from cases import over_dtypes
from jacobian_cases import (
    KINDS,
    assert_equal_but_for_rounding,
    images,
    jacobian_in_plain_pytorch,
    network,
    norm_in_plain_pytorch,
    over_impls,
    over_kinds,
    over_laws,
    over_squares,
    parameter_gradients,
)
from robustkern import batch_coupling, input_jacobian, jacobian_norm, jacobian_spectral_norm
from robustkern._basis import basis_cotangents
from robustkern.testing import assert_as_accurate_as_reference


@over_kinds
@over_squares
@over_impls
@pytest.mark.parametrize("projections", ["exact", 4])
@pytest.mark.parametrize("installed", [False, True])
def test_exact_values_and_gradients(kind, squared, impl, projections, installed, device):
    """A basis and a whole frame give the Frobenius norm and its gradients, to the rounding of float64."""
    model, x = network(device), images(device)
    with robustkern.fused_double_backward() if installed else contextlib.nullcontext():
        actual = jacobian_norm(model(x), x, projections, kind=kind, squared=squared, impl=impl)
    expected = norm_in_plain_pytorch(model(x).unsqueeze(2), x, kind, squared)
    assert actual.shape == (6,)
    assert_equal_but_for_rounding(actual, expected)
    for a, e in zip(parameter_gradients(actual.sum(), model)[:3], parameter_gradients(expected.sum(), model)):
        assert e.any()
        assert_equal_but_for_rounding(a, e, 1000)
    (a,), (e,) = (torch.autograd.grad(n.sum(), x, retain_graph=True) for n in (actual, expected))
    assert e.any()
    assert_equal_but_for_rounding(a, e, 1000)


@over_kinds
@over_laws
@over_squares
@over_impls
def test_estimates_and_their_gradients(kind, law, squared, impl, device):
    """Compared with autograd.grad, for given cotangents; fisher's depend on the outputs and are differentiated."""
    model, x = network(device), images(device)
    generators = [torch.Generator(device).manual_seed(5) for _ in range(2)]
    actual = jacobian_norm(
        model(x), x, 3, law=law, kind=kind, squared=squared, generator=generators[0], weight=0.5, impl=impl
    )
    outputs = model(x)
    v = robustkern.reference.random_cotangents(outputs.detach(), 3, law=law, generator=generators[1])
    if kind == "centred":
        v = v - v.mean(2, keepdim=True)
    elif kind == "fisher":
        p = outputs.softmax(1)
        v = p.sqrt() * v - p * (p.sqrt() * v).sum(2, keepdim=True)
    rows = [torch.autograd.grad(outputs, x, w, create_graph=True)[0].flatten(1) for w in v]
    expected = 0.25 * torch.stack([row.square().sum(1) for row in rows]).mean(0)
    expected = expected if squared else expected.sqrt()
    torch.testing.assert_close(actual, expected)
    for a, e in zip(parameter_gradients(actual.sum(), model)[:3], parameter_gradients(expected.sum(), model)):
        assert e.any()
        torch.testing.assert_close(a, e)


def test_fisher_is_differentiated_through_the_probabilities(device):
    """The last bias enters through p alone."""
    model, x = network(device), images(device)
    for projections in ("exact", 4):
        norm = jacobian_norm(model(x), x, projections, kind="fisher").sum()
        bias = parameter_gradients(norm, model)[3]
        assert bias.norm() > 1e-3 * norm
        expected = parameter_gradients(norm_in_plain_pytorch(model(x).unsqueeze(2), x, "fisher").sum(), model)[3]
        torch.testing.assert_close(bias, expected)


@over_kinds
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_dense_outputs(kind, classes, device):
    """[B, C, H, W]: the classes of each position have a softmax and a mean of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, classes, 3, stride=2)).to(device)
    model, x = model.double(), images(device, count=3)
    outputs = model(x)
    assert outputs.shape == (3, classes, 2, 2)
    expected = norm_in_plain_pytorch(outputs.flatten(2), x, kind)
    for projections in ("exact", 4 * classes):
        actual = jacobian_norm(outputs, x, projections, kind=kind)
        torch.testing.assert_close(actual, expected)
        assert (actual.max() < 1e-14) == (classes == 1 and kind != "plain")
        for a, e in zip(parameter_gradients(actual.sum(), model), parameter_gradients(expected.sum(), model)):
            torch.testing.assert_close(a, e)


def test_weight_per_channel(device):
    model, x = network(device), images(device)
    weight = torch.tensor([0.5, 1.0, 2.0], device=device, dtype=x.dtype)
    outputs = model(x)
    actual = jacobian_norm(outputs, x, "exact", weight=weight)
    jacobian = input_jacobian(outputs, x) * weight.view(3, 1, 1)
    torch.testing.assert_close(actual, jacobian.flatten(1).square().sum(1))


def test_reductions(device):
    model, x = network(device), images(device)
    outputs = model(x)

    def call(reduction):
        generator = torch.Generator(device).manual_seed(0)
        return jacobian_norm(outputs, x, 2, reduction=reduction, generator=generator, return_variance=True)

    norm, variance = call("none")
    for reduction, count in (("mean", 6), ("sum", 1)):
        reduced = call(reduction)
        torch.testing.assert_close(reduced[0], norm.sum() / count)
        torch.testing.assert_close(reduced[1], variance.sum() / count**2)
    assert not variance.requires_grad


def test_does_not_depend_on_the_rest_of_the_batch(device):
    model, x = network(device), images(device)
    all_of_them = jacobian_norm(model(x), x, "exact")
    for i in range(6):
        one = x[i : i + 1].detach().requires_grad_()
        torch.testing.assert_close(jacobian_norm(model(one), one, "exact"), all_of_them[i : i + 1])


@over_dtypes
@over_kinds
def test_dtypes(dtype, kind, device):
    model, x = network(device, dtype), images(device, dtype)
    norm = jacobian_norm(model(x), x, 2, kind=kind)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    norm.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert norm.isfinite().all() and (norm > 0).all()


@over_kinds
def test_autocast(kind, device):
    model, x = network(device, torch.float32), images(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        outputs = model(x)
        norm = jacobian_norm(outputs, x, "exact", kind=kind)
        assert outputs.dtype == torch.bfloat16 and norm.dtype == torch.float32
    # A kind's cotangents are rounded to bfloat16; plain PyTorch's, rows of the identity, need not be. With the same
    # cotangents, PyTorch's own backward gives the same; and both are as exact as the dtype that they are computed in.
    rows = [torch.autograd.grad(outputs, x, w, retain_graph=True)[0] for w in basis_cotangents(outputs.detach(), kind)]
    torch.testing.assert_close(norm, sum(row.flatten(1).square().sum(1) for row in rows))
    eager = norm_in_plain_pytorch(outputs.float().unsqueeze(2), x, kind)
    x = images(device)
    exact = norm_in_plain_pytorch(network(device)(x).unsqueeze(2), x, kind)
    assert_as_accurate_as_reference(norm.bfloat16(), eager.bfloat16(), exact, what="norm")
    norm.mean().backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in list(model.parameters())[:3])


@over_kinds
def test_compiled_whole(kind, device):
    """One graph of forward, K gradients and their backward, with the projections drawn inside."""
    model, x = network(device, torch.float32), images(device, torch.float32)

    def gradients(model, x):
        outputs = model(x)
        penalty = jacobian_norm(outputs, x, 2, kind=kind, impl="reference", reduction="mean")
        return torch.autograd.grad(F.cross_entropy(outputs, labels) + penalty, tuple(model.parameters()))

    labels = torch.arange(6, device=device) % 4
    torch.manual_seed(7)
    eager = gradients(model, x)
    torch.manual_seed(7)
    exact = gradients(network(device), images(device))
    torch.manual_seed(7)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(gradients, backend="eager", fullgraph=True)(model, x)
    for actual, rounded, truth in zip(compiled, eager, exact, strict=True):
        assert_as_accurate_as_reference(actual, rounded, truth, what="gradient")


def test_create_graph(device):
    model, x = network(device), images(device)
    outputs = model(x)

    def call(**options):
        generator = torch.Generator(device).manual_seed(0)
        return jacobian_norm(outputs, x, 2, kind="fisher", generator=generator, **options)

    measured = call(create_graph=False)
    assert not measured.requires_grad
    torch.testing.assert_close(call(), measured)
    with torch.no_grad():  # the graph of the outputs is there, so that their Jacobian can still be measured
        assert not call().requires_grad
        assert call(create_graph=True).requires_grad
        assert not input_jacobian(outputs, x).requires_grad
        assert not jacobian_spectral_norm(outputs, x).requires_grad
    outputs.sum().backward()  # the graph is kept


def test_empty_batch(device):
    model = network(device)
    x = torch.rand(0, 3, 5, 5, device=device, dtype=torch.float64).requires_grad_()
    for projections in (1, "exact"):
        norm = jacobian_norm(model(x), x, projections)
        assert norm.shape == (0,)
        norm.sum().backward()
    assert input_jacobian(model(x), x).shape == (0, 4, 3, 5, 5)
    assert jacobian_spectral_norm(model(x), x).shape == (0,)


@over_kinds
@over_squares
@pytest.mark.parametrize("projections", [1, 2, "exact"])
def test_samples_without_jacobian(kind, squared, projections, device):
    """A dead sample has a zero norm, whose derivative is zero and not NaN."""
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], device=device, requires_grad=True)
    w = torch.tensor([[1.0, 0.5], [0.5, 1.0]], device=device, requires_grad=True)
    norm = jacobian_norm(F.relu(x @ w).square(), x, projections, kind=kind, squared=squared)
    norm.sum().backward()
    assert norm[0] == 0
    assert norm[1] > 0
    assert w.grad.isfinite().all() and w.grad.any()
    assert not x.grad[0].any()


@pytest.mark.parametrize("classes", [1, 2])
@over_laws
def test_few_classes(classes, law, device):
    model, x = network(device, classes=classes), images(device)
    outputs = model(x)
    for kind in KINDS:
        expected = norm_in_plain_pytorch(outputs.unsqueeze(2), x, kind)
        if classes == 1 and law in ("orthonormal", "sphere", "rademacher"):
            torch.testing.assert_close(jacobian_norm(outputs, x, kind=kind, law=law), expected)
        torch.testing.assert_close(jacobian_norm(outputs, x, "exact", kind=kind), expected)
        norm = jacobian_norm(outputs, x, 1, kind=kind, law=law).sum()
        assert all(grad.isfinite().all() for grad in parameter_gradients(norm, model))


def test_the_generator_decides(device):
    model, x = network(device), images(device)
    outputs = model(x)
    generator = torch.Generator(device).manual_seed(3)
    state = generator.get_state()
    first, second = (jacobian_norm(outputs, x, generator=generator) for _ in range(2))
    generator.set_state(state)
    assert torch.equal(jacobian_norm(outputs, x, generator=generator), first)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    default = jacobian_norm(outputs, x)
    torch.manual_seed(4)
    assert torch.equal(jacobian_norm(outputs, x), default)


# ------------------------------------------------------------------ the Jacobian itself and its largest singular value


def test_input_jacobian(device):
    model, x = network(device), images(device)
    actual = input_jacobian(model(x), x)
    assert actual.shape == (6, 4, 3, 5, 5)
    expected = torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0]))(x)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(actual)
    for a, e in zip(*(parameter_gradients((j * weight).sum(), model)[:3] for j in (actual, expected))):
        assert e.any()
        torch.testing.assert_close(a, e)
    dense = nn.Conv2d(3, 2, 3).to(x)
    assert input_jacobian(dense(x), x).shape == (6, 2, 3, 3, 3, 5, 5)


@over_impls
def test_spectral_norm(impl, device):
    model, x = network(device), images(device)
    actual, v = jacobian_spectral_norm(model(x), x, 100, return_vectors=True, impl=impl)
    expected = torch.linalg.matrix_norm(jacobian_in_plain_pytorch(model(x), x), 2)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(parameter_gradients(actual.sum(), model)[:3], parameter_gradients(expected.sum(), model)):
        assert e.any()
        torch.testing.assert_close(a, e)
    torch.testing.assert_close(torch.linalg.vector_norm(v, dim=1), torch.ones(6, device=device, dtype=x.dtype))
    warm = jacobian_spectral_norm(model(x), x, 0, start=3 * v, impl=impl)
    torch.testing.assert_close(warm, expected)


def test_spectral_norm_rises_to_the_true_value(device):
    model, x = network(device), images(device)
    outputs, start = model(x), torch.ones(6, 4, device=device, dtype=torch.float64)
    norms = [jacobian_spectral_norm(outputs, x, n, start=start, create_graph=False) for n in (0, 1, 2, 5, 20)]
    norms.append(torch.linalg.matrix_norm(input_jacobian(outputs, x).flatten(2), 2))
    for lower, higher in itertools.pairwise(norms):
        assert (lower <= higher * (1 + 1e-14)).all()
    assert (norms[0] < 0.99 * norms[-1]).any()


def test_spectral_norm_of_a_zero_jacobian(device):
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], device=device, requires_grad=True)
    w = torch.tensor([[1.0, 0.5], [0.5, 1.0]], device=device, requires_grad=True)
    norm = jacobian_spectral_norm(F.relu(x @ w).square(), x)
    norm.sum().backward()
    assert norm[0] == 0 and norm[1] > 0
    assert w.grad.isfinite().all() and w.grad.any()


# ------------------------------------------------------------------ coupling


def test_batch_coupling(device):
    model, x = network(device), images(device)
    assert batch_coupling(model, x) == 0
    coupled = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5), network("cpu")).to(x)
    before = {name: value.clone() for name, value in coupled.state_dict().items()}
    state = torch.get_rng_state()
    share = batch_coupling(coupled.train(), x)
    assert 0.01 < share < 0.5
    assert all(torch.equal(value, before[name]) for name, value in coupled.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert batch_coupling(coupled.eval(), x) == 0


@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e-30, 1e20], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_batch_coupling_is_what_its_formula_says(scale, wrapped, device):
    """The share is c / (1 + c) of the squares where half of what each sample gets comes from each other one."""
    torch.manual_seed(0)
    mixing = nn.Linear(4, 4, bias=False).to(device)

    def mixed(x):
        return scale * (mixing(x) + 0.5 * mixing(x).flip(0))

    class Module(nn.Module):
        def forward(self, x):
            return mixed(x)

    x = torch.randn(2, 4, device=device)  # each half is one sample
    model = Module() if wrapped else mixed
    assert batch_coupling(model, x) == pytest.approx((0.25 / 1.25) ** 0.5, rel=0.5)
    shares = [batch_coupling(lambda x, c=c: x * scale + c * scale * x.flip(0), x) for c in (0.5, 2.0)]
    assert shares == pytest.approx([(0.25 / 1.25) ** 0.5, (4 / 5) ** 0.5], rel=1e-3)


def test_batch_coupling_finds_rows_that_only_trade_places(device):
    x = torch.randn(8, 4, device=device)
    assert batch_coupling(lambda x: x.roll(2, 0), x) > 0.5
    assert batch_coupling(lambda x: x.roll(1, 0), x) > 0.5


def test_batch_coupling_refuses(device):
    model, x = network(device), images(device)
    with pytest.raises(ValueError, match="batch_coupling: at least two samples are needed, got 1"):
        batch_coupling(model, x[:1])
    with pytest.raises(ValueError, match=r"batch_coupling: outputs must have the 6 rows of x, got shape \[4\]"):
        batch_coupling(lambda x: model(x).sum(0), x)
    with pytest.raises(TypeError, match="batch_coupling: outputs must be a tensor, got tuple"):
        batch_coupling(lambda x: (model(x),), x)
    with pytest.raises(TypeError, match=r"batch_coupling: x must be a floating-point tensor, got torch\.int64"):
        batch_coupling(model, x.long())
    with pytest.raises(ValueError, match="batch_coupling: outputs does not depend on x"):
        batch_coupling(lambda x: model[-1].weight[:1].expand(6, -1), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_spectral_norm_in_half_precision(dtype, device):
    """v has unit length only to 8 or 11 bits, as its entries are rounded alike: the norm is divided by the length."""
    x = torch.randn(3, 300, device=device).to(dtype).requires_grad_()
    norm = jacobian_spectral_norm(1 * x, x, 0, start=torch.ones_like(x), create_graph=False)
    torch.testing.assert_close(norm, torch.ones(3, device=device))
