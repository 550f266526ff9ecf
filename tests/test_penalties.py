"""gradient_norm: what it computes, and that every wrong use raises one sentence instead of training nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import over_dtypes
from robustkern import gradient_norm

NORMS = [(1.0, False), (2.0, False), (2.0, True), (math.inf, False), (3.0, False)]
over_norms = pytest.mark.parametrize(("p", "squared"), NORMS)


def model_and_data(device, dtype=torch.float64, inputs=(3, 5, 5)):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(36, 4)).to(device, dtype)
    return model, torch.rand(6, *inputs, device=device, dtype=dtype), torch.tensor([0, 1, 2, 3, 0, 1], device=device)


def per_sample_loss(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def norm_in_plain_pytorch(loss, x, p, squared, weight=None):
    """The norm, independent of this package."""
    gradients = torch.stack([torch.autograd.grad(one, x, create_graph=True)[0][i] for i, one in enumerate(loss)])
    if weight is not None:
        gradients = gradients * weight
    norms = torch.linalg.vector_norm(gradients.flatten(1), ord=p, dim=1)
    return norms**2 if squared else norms


@over_norms
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_values_and_parameter_gradients(p, squared, impl, device):
    model, x, y = model_and_data(device)
    weight = torch.tensor([0.5, 1.0, 2.0], device=device, dtype=x.dtype)
    for channel_weight in (None, weight):
        x = x.detach().requires_grad_()
        actual = gradient_norm(per_sample_loss(model, x, y), x, p, weight=channel_weight, squared=squared, impl=impl)
        broadcast = None if channel_weight is None else channel_weight.view(3, 1, 1)
        expected = norm_in_plain_pytorch(per_sample_loss(model, x, y), x, p, squared, broadcast)
        assert actual.shape == (6,)
        assert (actual > 0).all()
        torch.testing.assert_close(actual, expected)
        leaves = [*list(model.parameters())[:3], x]  # the last bias has no part in the gradient's own derivative
        for a, e in zip(torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
            assert e.any()
            torch.testing.assert_close(a, e)


@over_dtypes
def test_dtypes(dtype, device):
    model, x, y = model_and_data(device, dtype)
    x.requires_grad_()
    norm = gradient_norm(per_sample_loss(model, x, y), x)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    norm.mean().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


def test_does_not_depend_on_the_rest_of_the_batch(device):
    model, x, y = model_and_data(device)
    x.requires_grad_()
    all_of_them = gradient_norm(per_sample_loss(model, x, y), x)
    for i in range(6):
        one = x[i : i + 1].detach().requires_grad_()
        alone = gradient_norm(per_sample_loss(model, one, y[i : i + 1]), one)
        torch.testing.assert_close(alone, all_of_them[i : i + 1])


def test_create_graph(device):
    model, x, y = model_and_data(device)
    x.requires_grad_()
    loss = per_sample_loss(model, x, y)
    measured = gradient_norm(loss, x, create_graph=False)
    assert not measured.requires_grad
    assert gradient_norm(loss, x).requires_grad
    with torch.no_grad():  # the graph of the loss is there, so that its gradient can still be measured
        torch.testing.assert_close(gradient_norm(loss, x), measured)
        assert gradient_norm(loss, x, create_graph=True).requires_grad
    loss.sum().backward()  # the graph is kept


def test_several_norms_of_one_loss(device):
    model, x, y = model_and_data(device)
    x.requires_grad_()
    loss = per_sample_loss(model, x, y)
    total = loss.mean() + sum(gradient_norm(loss, x, p).mean() for p in (1, 2, math.inf))
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_empty_batch(device):
    model, x, y = model_and_data(device)
    x = x[:0].requires_grad_()
    norm = gradient_norm(per_sample_loss(model, x, y[:0]), x)
    assert norm.shape == (0,)
    norm.sum().backward()


def test_samples_without_gradient(device):
    """A dead unit gives a zero norm, whose derivative is zero and not NaN."""
    x = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], device=device, requires_grad=True)
    w = torch.ones(2, device=device, requires_grad=True)
    norm = gradient_norm(F.relu(x @ w).square(), x)
    norm.sum().backward()
    assert norm[0] == 0
    assert norm[1] > 0
    assert w.grad.isfinite().all()
    assert w.grad.any()
    assert not x.grad[0].any()


# ------------------------------------------------------------------ wrong use


def misuses(model, x, y):
    """What the user does wrong, the error, and words of the sentence that says so."""
    leaf = x.detach().requires_grad_()
    loss = per_sample_loss(model, leaf, y)
    other = x.detach().requires_grad_()
    frozen = nn.Linear(75, 1, device=x.device, dtype=x.dtype).requires_grad_(False)
    with torch.no_grad():
        without_graph = per_sample_loss(model, leaf, y)
    plain = per_sample_loss(model, x, y)
    return {
        "x does not require grad": ((plain, x), ValueError, r"x does not require grad: call x\.requires_grad_\(\)"),
        "another tensor": ((loss, other), ValueError, r"loss does not depend on x: compute it from this very tensor"),
        "requires_grad too late": ((plain, x.detach().requires_grad_()), ValueError, "loss does not depend on x"),
        "detached loss": ((loss.detach(), leaf), ValueError, r"loss has no graph: .* or detached"),
        "no_grad": ((without_graph, leaf), ValueError, r"loss has no graph: it was computed under torch\.no_grad\(\)"),
        "mean loss": ((loss.mean(), leaf), ValueError, r"one value per sample, .*got \[\]: use reduction='none'"),
        "column of losses": ((loss[:, None], leaf), ValueError, r"shape \[6\] .*got \[6, 1\]"),
        "another batch": ((loss[:2], leaf), ValueError, r"shape \[6\] .*got \[2\]"),
        "integer x": ((loss, x.long()), TypeError, r"x must be a floating-point tensor, got torch\.int64"),
        "integer loss": ((loss.long(), leaf), TypeError, r"loss must be a floating-point tensor, got torch\.int64"),
        "a number as loss": ((1.0, leaf), TypeError, "loss must be a tensor, got float"),
        "an array as x": ((loss, [1.0]), TypeError, "x must be a tensor, got list"),
        "linear and frozen": ((frozen(leaf.flatten(1)).squeeze(1), leaf), ValueError, "would train nothing"),
    }


@pytest.mark.parametrize("name", list(misuses(*model_and_data("cpu"))))
def test_wrong_use_is_told_in_one_sentence(name, device):
    inputs, error, message = misuses(*model_and_data(device))[name]
    with pytest.raises(error, match=rf"^gradient_norm: .*{message}") as raised:
        gradient_norm(*inputs)
    assert "\n" not in str(raised.value)


def test_a_linear_frozen_model_can_be_measured(device):
    x = torch.ones(3, 4, device=device, requires_grad=True)
    w = torch.tensor([3.0, 0.0, 4.0, 0.0], device=device)
    assert gradient_norm(x @ w, x, create_graph=False).tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("options", [{"p": 0.5}, {"p": 1, "squared": True}, {"impl": "other"}], ids=str)
def test_options_are_checked(options, device):
    model, x, y = model_and_data(device)
    x.requires_grad_()
    with pytest.raises(ValueError, match="row_norm: "):
        gradient_norm(per_sample_loss(model, x, y), x, **options)
