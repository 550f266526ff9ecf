"""The gradient penalty by finite differences: one graph at a time, and the gradient that both at once would give."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import peak_memory
from method_losses import WEIGHT, batch, input_gradient, network
from robustkern import losses

STEP = 0.1


def smooth(device, dtype=torch.float64, batch_norm=False):
    model = network(device, dtype, batch_norm)
    return model, batch(device, dtype)


def with_both_graphs(model, x, y, p, eps, squared):
    """The mean loss and norm, in stock PyTorch; a squared norm moves each image by eps^2 times its gradient."""
    loss, grad = input_gradient(model, x, y)
    grad = (eps * grad).detach()
    if squared:
        length = grad.square().flatten(1).sum(1).mean().sqrt()
        moved, step = grad, STEP / length
    else:
        norm = torch.linalg.vector_norm(grad.flatten(1), p, dim=1).view(-1, 1, 1, 1)
        moved, step = grad.sign() * (grad.abs() / norm) ** (p - 1), STEP
    quotient = (F.cross_entropy(model(x + step * eps * moved), y, reduction="none") - loss).mean() / step
    return loss.mean(), quotient, 2.0 if squared else 1.0


@pytest.mark.parametrize(("p", "squared"), [(1.0, False), (2.0, False), (3.0, False), (2.0, True)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_gradient_is_that_of_both_graphs(p, squared, mode, device):
    model, (x, y) = smooth(device, batch_norm=True)
    getattr(model, mode)()
    eps = torch.tensor([0.1, 0.2, 0.4], device=device, dtype=x.dtype)
    penalty = losses.GradientPenalty(WEIGHT, p, eps, squared, estimator="finite-difference", h=STEP)
    loss, quotient, factor = with_both_graphs(model, x, y, p, eps.view(3, 1, 1), squared)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss + WEIGHT * factor * quotient, parameters)
    terms = penalty(model, x, y)
    torch.testing.assert_close((terms.orientation, terms.smoothness), (loss, quotient))
    share = torch.autograd.grad(terms.smoothness, parameters, retain_graph=True)
    assert all(part.any() for part in share)
    terms.backward(inputs=parameters)
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))


def test_a_squared_norm_converges_where_batch_norm_mixes_the_samples(device):
    model, (x, y) = smooth(device, batch_norm=True)
    penalty = losses.GradientPenalty(WEIGHT, 2.0, 0.1, squared=True, estimator="finite-difference")
    errors = penalty.finite_difference_error(model, x, y, (1e-2, 1e-3, 1e-4))
    for previous, error in itertools.pairwise(errors):
        for kind in ("value_error", "gradient_error"):
            assert 5 < getattr(previous, kind) / getattr(error, kind) < 20, kind


def test_what_both_passes_share_is_kept(device):
    """A weight that is computed once for all passes: its graph lies in both."""
    model, (x, y) = smooth(device)
    nn.utils.parametrizations.weight_norm(model[0])
    penalty, parameters = losses.GradientPenalty(estimator="finite-difference"), list(model.parameters())
    expected = torch.autograd.grad(penalty(model, x, y).total, parameters)
    with nn.utils.parametrize.cached():
        actual = torch.autograd.grad(penalty(model, x, y).total, parameters)
    torch.testing.assert_close(actual, expected)


def test_vanishing_gradients_and_no_grad(device):
    model, (x, y) = smooth(device)
    penalty = losses.GradientPenalty(WEIGHT, 2.0, squared=True, estimator="finite-difference")
    with torch.no_grad():
        value = penalty(model, x, y)
        assert not value.total.requires_grad and value.smoothness > 0
        model[-1].weight.zero_()
    terms = penalty(model, x, y)
    terms.backward(inputs=model.parameters())
    assert terms.smoothness == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_third_order_is_refused(device):
    model, (x, y) = smooth(device)
    total = losses.GradientPenalty(estimator="finite-difference")(model, x, y).total
    with pytest.raises(RuntimeError, match="GradientPenalty: its finite difference is differentiable once"):
        torch.autograd.grad(total, list(model.parameters()), create_graph=True)


def test_it_holds_one_graph_at_a_time(device):
    torch.manual_seed(3)
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.GELU())]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(5)).to(device)
    x, y = torch.rand(16, 3, 16, 16, device=device), torch.zeros(16, dtype=torch.long, device=device)

    def peak(loss):
        def step():
            loss(model, x, y).backward(inputs=model.parameters())
            model.zero_grad()

        return peak_memory(step, device)

    plain = peak(losses.CrossEntropy())
    assert peak(losses.GradientPenalty(estimator="finite-difference")) < 1.15 * plain
    assert peak(losses.GradientPenalty()) > 1.6 * plain
