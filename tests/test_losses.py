"""Losses end to end: parameter gradients of loss + weight * penalty are those of plain PyTorch, and training works."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import over_dtypes
from robustkern import Terms
from robustkern.losses import CrossEntropy, GradientPenalty
from robustkern.testing import assert_as_accurate_as_reference

NORMS = [(1.0, False), (2.0, False), (2.0, True), (math.inf, False)]
over_norms = pytest.mark.parametrize(("p", "squared"), NORMS)
WEIGHT, EPS = 0.7, 3.0


def network(device, dtype=torch.float64):
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2), nn.Softplus(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 5)).to(device, dtype)


def batch(device, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(size, 3, 6, 6, generator=generator, dtype=torch.float64).to(device, dtype)
    return x, torch.randint(5, (size,), generator=generator).to(device)


def terms_in_plain_pytorch(model, x, y, p, squared, eps, label_smoothing=0.0):
    """Independent of this package."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="none", label_smoothing=label_smoothing)
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    norms = torch.linalg.vector_norm((eps * gradient).flatten(1), ord=p, dim=1)
    return loss.mean(), (norms**2 if squared else norms).mean()


def parameter_gradients(total, model):
    return [g.detach() for g in torch.autograd.grad(total, list(model.parameters()), retain_graph=True)]


@over_norms
@pytest.mark.parametrize("impl", ["kernel", "reference"])
@pytest.mark.parametrize("through", ["backward", "autograd.grad"])
def test_parameter_gradients_in_float64(p, squared, impl, through, device):
    model, (x, y) = network(device), batch(device)
    orientation, smoothness = terms_in_plain_pytorch(model, x, y, p, squared, EPS, 0.1)
    expected = parameter_gradients(orientation + WEIGHT * smoothness, model)
    terms = GradientPenalty(WEIGHT, p, EPS, squared=squared, label_smoothing=0.1, impl=impl)(model, x, y)
    share = parameter_gradients(terms.smoothness, model)
    torch.testing.assert_close(terms.orientation, orientation)
    torch.testing.assert_close(terms.smoothness, smoothness)
    if through == "backward":
        terms.backward(inputs=model.parameters())
        actual = [parameter.grad for parameter in model.parameters()]
    else:
        actual = parameter_gradients(terms.total, model)
    for a, e, s in zip(actual, expected, share, strict=True):
        torch.testing.assert_close(a, e)
        assert s.any()  # the penalty trains every parameter
    whole, part = (torch.cat([g.flatten() for g in gradients]) for gradients in (expected, share))
    assert WEIGHT * part.norm() > 0.01 * whole.norm()
    assert not x.requires_grad
    assert x.grad is None


@over_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameter_gradients_are_as_accurate_as_plain_pytorch(p, squared, dtype, device):
    model, (x, y) = network(device, dtype), batch(device, dtype)
    actual = GradientPenalty(WEIGHT, p, EPS, squared=squared)(model, x, y)
    eager = terms_in_plain_pytorch(model, x, y, p, squared, EPS)
    actual, eager = (parameter_gradients(t, model) for t in (actual.total, eager[0].to(dtype) + WEIGHT * eager[1]))
    model, x = model.double(), x.double()
    exact = terms_in_plain_pytorch(model, x, y, p, squared, EPS)
    exact = parameter_gradients(exact[0] + WEIGHT * exact[1], model)
    # As one vector: a layer's gradient alone is a sum with cancellation that no two orders of summation agree on.
    assert_as_accurate_as_reference(*(torch.cat([g.flatten() for g in t]) for t in (actual, eager, exact)))


def test_cross_entropy(device):
    model, (x, y) = network(device), batch(device)
    terms = CrossEntropy(label_smoothing=0.1, temperature=2.0)(model, x, y)
    expected = F.cross_entropy(model(x) / 2.0, y, label_smoothing=0.1)
    torch.testing.assert_close(terms.total, expected)
    assert (terms.smoothness, terms.weight) == (0, 0)
    terms.backward()
    for parameter, e in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(parameter.grad, e)


def test_eps_per_channel(device):
    model, (x, y) = network(device), batch(device)
    eps = torch.tensor([0.1, 0.2, 0.4], device=device, dtype=x.dtype)
    for given in (eps, eps.view(3, 1, 1), eps.float()):
        terms = GradientPenalty(p=1, eps=given)(model, x, y)
        expected = terms_in_plain_pytorch(model, x, y, 1, False, given.double().view(3, 1, 1))[1]
        torch.testing.assert_close(terms.smoothness, expected)
    per_number = [GradientPenalty(p=2, eps=e, squared=True)(model, x, y).smoothness for e in (0.1, 0.2)]
    torch.testing.assert_close(per_number[1], 4 * per_number[0])


@over_norms
def test_the_weight_means_the_same_for_every_batch_size(p, squared, device):
    model, (x, y) = network(device), batch(device)
    penalty = GradientPenalty(WEIGHT, p, EPS, squared=squared)
    once, thrice = penalty(model, x, y), penalty(model, x.repeat(3, 1, 1, 1), y.repeat(3))
    torch.testing.assert_close(thrice.orientation, once.orientation)
    torch.testing.assert_close(thrice.smoothness, once.smoothness)
    for a, e in zip(parameter_gradients(thrice.total, model), parameter_gradients(once.total, model), strict=True):
        torch.testing.assert_close(a, e)


def test_smoothness_predicts_the_loss_of_a_small_attack(device):
    """With p dual to the threat's norm, it is, to first order, what the worst perturbation adds."""
    model, (x, y) = network(device), batch(device)
    eps = 1e-5
    terms = GradientPenalty(p=1, eps=eps)(model, x, y)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    worst, best = (F.cross_entropy(model(x + sign * eps * gradient.sign()), y) for sign in (1, -1))
    torch.testing.assert_close((worst - best) / (2 * eps), terms.smoothness / eps)


@over_dtypes
def test_terms_have_the_accumulation_dtype(dtype, device):
    model, (x, y) = network(device, dtype), batch(device, dtype)
    terms = GradientPenalty()(model, x, y)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert terms.orientation.dtype == terms.smoothness.dtype == terms.total.dtype == expected
    assert terms.detach().total.requires_grad is False


def test_integer_images_are_refused(device):
    with pytest.raises(TypeError, match=r"GradientPenalty: x must be a floating-point tensor, got torch\.uint8"):
        GradientPenalty()(network(device), batch(device)[0].to(torch.uint8), batch(device)[1])


def test_terms():
    terms = Terms(torch.tensor(2.0), torch.tensor(3.0), 0.5)
    assert terms.total == 3.5
    assert Terms(torch.tensor(2.0), torch.tensor(math.nan), 0.0).total == 2.0  # a term without weight has no effect
    w = torch.ones(2, requires_grad=True)
    v = torch.ones(2, requires_grad=True)
    Terms((w * v).sum(), (w * w).sum(), 0.5).backward(inputs=iter([w]))
    assert w.grad.tolist() == [2.0, 2.0]
    assert v.grad is None


@pytest.fixture
def one_thread():
    """One thread: on a busy machine, threads that wait for each other make many small steps thirty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_a_hundred_steps_leak_nothing(impl, device, emulated):
    model, penalty = network(device, torch.float32), GradientPenalty(WEIGHT, 2, EPS, impl=impl)
    references = []

    def step():
        x, y = batch(device, torch.float32, 8 if emulated else 16)
        terms = penalty(model, x, y)
        terms.backward(inputs=model.parameters())
        references.extend([weakref.ref(x), weakref.ref(terms.smoothness)])

    gc.disable()  # the collector would only hide a cycle through autograd's nodes
    try:
        for _ in range(10):
            step()
        before = torch.cuda.memory_allocated() if device == "cuda" else resident_megabytes()
        for _ in range(10 if emulated else 100):
            step()
        after = torch.cuda.memory_allocated() if device == "cuda" else resident_megabytes()
    finally:
        gc.enable()
    assert all(reference() is None for reference in references)
    assert after <= before + (0 if device == "cuda" else 8)  # a hundred graphs take more


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("p", "squared"), [(1.0, False), (2.0, True)])
def test_training_with_kernels_ends_where_training_with_the_reference_does(p, squared, device, emulated):
    ends = {}
    for impl in ("kernel", "reference"):
        model = network(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        penalty = GradientPenalty(0.1, p, EPS, squared=squared, impl=impl)
        x, y = batch(device, size=4)
        first = None
        for _ in range(10 if emulated else 100):
            optimizer.zero_grad()
            terms = penalty(model, x, y)
            terms.backward(inputs=model.parameters())
            optimizer.step()
            first = float(terms.total) if first is None else first
        assert float(terms.total) < first
        ends[impl] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert not torch.equal(ends["kernel"], torch.cat([q.detach().flatten() for q in network(device).parameters()]))
    torch.testing.assert_close(ends["kernel"], ends["reference"])
