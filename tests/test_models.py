"""Models: shapes, determinism, and independence of the samples of a batch."""

import pytest
import torch

from robustkern import models


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 17, 23)])
def test_small_cnn_adapts_to_the_image(shape):
    model = models.create("small-cnn", 7, shape, [0.4] * shape[0], [0.3] * shape[0])
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert 5e4 < sum(parameter.numel() for parameter in model.parameters()) < 4e5


@pytest.mark.parametrize("name", [name for name in models.MODELS if name != "small-cnn"])
def test_residual_networks(name):
    with torch.device("meta"):
        model = models.create(name, 10, (3, 32, 32))
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    expected = {"preact-resnet18": 11.17e6, "preact-resnet34": 21.28e6, "wide-resnet-28-10": 36.48e6}
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(expected[name], rel=2e-3)


def test_residual_network_runs_and_differentiates_twice():
    torch.manual_seed(0)
    model = models.create("preact-resnet18", 4, (1, 8, 8)).eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    first = next(model.network.features.parameters())
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().sum() > 0


def test_normalisation_is_part_of_the_model():
    model = models.create("small-cnn", 10, (3, 8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)
    torch.testing.assert_close(model.normalize(x), (x - mean) / std)
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())


def test_same_seed_same_weights():
    def build():
        torch.manual_seed(3)
        return models.create("small-cnn", 10, (1, 8, 8)).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_small_cnn_does_not_mix_samples():
    torch.manual_seed(0)
    model = models.create("small-cnn", 10, (1, 8, 8)).train()
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[1].sum(), x)
    assert grad[1].abs().sum() > 0 and grad[[0, 2, 3]].abs().sum() == 0


def test_wrong_use():
    with pytest.raises(ValueError, match="no model 'vgg'.*small-cnn"):
        models.create("vgg", 10, (3, 32, 32))
    with pytest.raises(ValueError, match="means"):
        models.create("small-cnn", 10, (3, 32, 32), (0.5,), (0.5,))
    with pytest.raises(ValueError, match="positive"):
        models.create("small-cnn", 10, (1, 8, 8), (0.5,), (0.0,))
