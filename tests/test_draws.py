"""Dropout and the like: a loss compares passes of one function, and the generators end as after one pass."""

import itertools

import pytest
import torch
from torch import nn

from method_losses import ATTACKED, CLASSES, EPS, PLAIN, WEIGHT, batch, drawn, found_by, gradients, prepared
from robustkern import Draw, losses

LOSSES = {case.name: case for case in ATTACKED + PLAIN}


class DropPath(nn.Module):
    """Skips a branch for some of the samples, chosen by torch.rand."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        if not self.training:
            return x + self.branch(x)
        kept = (torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < 0.5).to(x.dtype)
        return x + 2.0 * kept * self.branch(x)


def network(device, dtype=torch.float64):
    torch.manual_seed(3)
    branch = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(0.3))
    layers = [nn.Flatten(), nn.Linear(108, 12), nn.SiLU(), nn.Dropout(0.5), DropPath(branch), nn.Linear(12, CLASSES)]
    model = nn.Sequential(*layers).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return model


class OneMask(nn.Module):
    """The same network with the same masks in every pass, forced from outside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        torch.manual_seed(5)
        return self.model(x)


def states(device):
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]


def made(name, device):
    if name == "AWP":
        return losses.AWP(prepared(LOSSES["TRADES"], device))
    if name == "AWP of a penalty":
        return losses.AWP(losses.CURE(WEIGHT, EPS))
    if name == "squared differences":
        return losses.GradientPenalty(WEIGHT, 2.0, EPS, squared=True, estimator="finite-difference")
    return prepared(LOSSES[name], device)


over_losses = pytest.mark.parametrize("name", [*LOSSES, "AWP", "AWP of a penalty", "squared differences"])


@over_losses
def test_all_passes_draw_the_same_masks(name, device):
    model, (x, y) = network(device), batch(device)
    results = []
    for net in (model, OneMask(model)):
        loss = made(name, device)
        torch.manual_seed(5)
        terms = loss(net, x, y, drawn(device))._replace(weight=0.5)
        results.append([terms.orientation, terms.smoothness, *gradients(terms.total, model)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)
    torch.manual_seed(6)
    assert not torch.equal(
        made(name, device)(model, x, y, drawn(device)).total, sum(results[0][:2])
    )  # there are masks at all


@over_losses
def test_the_generators_end_as_after_one_pass(name, device):
    model, (x, y) = network(device), batch(device)
    loss = made(name, device)
    torch.manual_seed(5)
    model(x)
    expected = states(device)
    torch.manual_seed(5)
    terms = loss(model, x, y, drawn(device))
    after = states(device)
    terms._replace(weight=0.5).backward()
    for mine, one, later in zip(after, expected, states(device), strict=True):
        assert torch.equal(mine, one) and torch.equal(mine, later)


@pytest.mark.parametrize("name", ["FGSM", "TRADES", "MART", "ALP", "VAT", "LocalLinearity"])
def test_an_image_does_not_differ_from_itself(name, device):
    model, (x, y) = network(device), batch(device)
    smoothness = prepared(LOSSES[name], device).terms(model, x, x, y, Draw()).smoothness
    assert abs(smoothness) < 1e-12


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_finite_differences_converge_under_dropout(p, device):
    model, (x, y) = network(device), batch(device)
    before = states(device)
    errors = losses.GradientPenalty(WEIGHT, p, EPS, estimator="finite-difference").finite_difference_error(
        model, x, y, (1e-2, 1e-3, 1e-4)
    )
    assert len({error.exact for error in errors}) == 1
    for previous, error in itertools.pairwise(errors):
        for kind in ("value_error", "gradient_error"):
            assert 5 < getattr(previous, kind) / getattr(error, kind) < 20, kind
    assert all(torch.equal(a, b) for a, b in zip(before, states(device), strict=True))  # a measurement draws nothing


def test_the_change_of_the_gradient_is_that_of_one_function(device):
    """CURE's difference along z is, for a small z, the Hessian's product with it."""
    model, (x, y) = network(device), batch(device)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    loss = nn.functional.cross_entropy(model(leaf), y, reduction="sum")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (product,) = torch.autograd.grad(grad, leaf, grad.detach().sign())
    exact, errors = product.square().sum() / len(x), []
    for eps in (1e-3, 1e-4, 1e-5):
        torch.manual_seed(5)
        errors.append(abs(losses.CURE(1.0, eps)(model, x, y).smoothness / eps**2 - exact))
    assert all(5 < previous / error < 20 for previous, error in itertools.pairwise(errors))


def test_gradients_at_neighbours_are_aligned(device):
    """With different masks they would not be, however close the neighbour."""
    model, (x, y) = network(device), batch(device)
    loss = losses.GradAlign(WEIGHT, 1e-7)
    assert loss(model, x, y).smoothness < 1e-6


def test_an_attack_inside_is_not_moved_by_masks(device):
    """The search for the adversary is in eval mode: it draws from the generator of the draw alone."""
    model, (x, y) = network(device), batch(device)
    for case in ATTACKED:
        loss = prepared(case, device)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            result = found_by(loss, model, x, y, drawn(device, 11))
            found.append(result[0] if isinstance(result, tuple) else result)
        assert torch.equal(*found) or case.name == "GradAlign"  # which looks at the model in its own mode
