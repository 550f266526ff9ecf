"""Mixed precision and activation checkpointing around a whole penalised step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from robustkern import gradient_norm
from robustkern.losses import GradientPenalty
from robustkern.ops import random_cotangents, row_norm, softmax_cross_entropy
from robustkern.testing import assert_as_accurate_as_reference

LOW = [torch.bfloat16, torch.float16]
over_low = pytest.mark.parametrize("low", LOW, ids=str)


def network(device, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 5)
    ).to(device, dtype)


def batch(device):
    torch.manual_seed(4)
    return torch.rand(6, 3, 6, 6, device=device), torch.randint(5, (6,), device=device)


def gradients(total, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


@over_low
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_penalised_step_under_autocast(low, p, device):
    """As accurate as the same step in plain PyTorch under the same autocast, with parameters in float32."""
    model, (x, y) = network(device), batch(device)
    results = {}
    for impl in ("kernel", "reference"):
        with torch.autocast(device, low):
            assert model(x).dtype == low
            terms = GradientPenalty(0.7, p, 3.0, impl=impl)(model, x, y)
            assert terms.total.dtype == torch.float32
        results[impl] = gradients(terms.total, model)
    exact = gradients(GradientPenalty(0.7, p, 3.0, impl="reference")(model.double(), x.double(), y).total, model)
    for result in results.values():
        assert result.dtype == torch.float32
    assert_as_accurate_as_reference(results["kernel"], results["reference"], exact)


@over_low
def test_operators_take_what_autocast_gives_them(low, device):
    """They accumulate in float32 by themselves, so that autocast has nothing to change."""
    x = torch.randn(4, 40, device=device, dtype=low)
    target = torch.tensor([0, 3, 2, 39], device=device)
    plain = row_norm(x, impl="kernel"), softmax_cross_entropy(x, target, impl="kernel")
    with torch.autocast(device, low):
        cast = row_norm(x, impl="kernel"), softmax_cross_entropy(x, target, impl="kernel")
    for a, e in zip(cast, plain, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)
    options = {"kind": "fisher", "seed": torch.tensor([3], device=device), "impl": "kernel"}
    w = random_cotangents(x, 2, **options)
    with torch.autocast(device, low):
        assert torch.equal(random_cotangents(x, 2, **options), w)
    assert w.dtype == low  # w is a cotangent of the outputs, and has their dtype
    probabilities = x.float().softmax(1)  # float32 beside 16-bit logits, as autocast leaves them
    assert softmax_cross_entropy(x, probabilities, impl="kernel").dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scaled_loss_is_unscaled_before_its_norm(scale, device):
    """The recipe for gradient penalties with a GradScaler; powers of two cost no digits."""
    model, (x, y) = network(device), batch(device)
    x.requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="none")
    scaled = gradient_norm(scale * loss, x, weight=1 / scale)
    assert torch.equal(scaled, gradient_norm(loss, x))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_activation_checkpointing(p, device):
    model, (x, y) = network(device), batch(device)

    def recomputed(v):
        for layer in model:
            v = checkpoint(layer, v, use_reentrant=False)
        return v

    penalty = GradientPenalty(0.7, p, 3.0, impl="kernel")
    assert torch.equal(gradients(penalty(recomputed, x, y).total, model), gradients(penalty(model, x, y).total, model))


def test_operators_inside_a_checkpoint(device):
    x, y = torch.randn(4, 10, device=device, requires_grad=True), torch.tensor([1, 2, 3, 4], device=device)

    def both(v):
        return softmax_cross_entropy(v, y, impl="kernel") + row_norm(v, impl="kernel")

    def second(function):
        (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    assert torch.equal(second(lambda v: checkpoint(both, v, use_reentrant=False)), second(both))
