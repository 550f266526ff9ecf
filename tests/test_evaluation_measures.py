"""Intervals, slopes and margins against closed forms."""

import pytest
import torch
from torch import nn

from robustkern.evaluation import linearised_robustness, local_lipschitz, logit_margin, wilson_interval


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_covers_as_often_as_it_says():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        low, high = wilson_interval(int((torch.rand(40, generator=generator) < 0.1).sum()), 40, 0.9)
        covered += low <= 0.1 <= high
    assert 0.87 < covered / 2000 < 0.95


@pytest.mark.parametrize("arguments", [(-1, 10), (11, 10), (1, 10, 0.0), (1, 10, 1.0)])
def test_wilson_interval_refuses(arguments):
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(*arguments)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double().eval()


def test_local_lipschitz_of_a_linear_function(linear):
    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    weight = linear[1].weight
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 16)
    truth = float((signs @ weight.detach().T).abs().sum(1).max())
    found = local_lipschitz(linear, x, 0.1, steps=20, generator=torch.Generator().manual_seed(0))
    assert float(found.max()) <= truth * (1 + 1e-9)
    assert float(found.max()) >= 0.95 * truth
    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    expected = float(one[1].weight.detach().abs().sum())
    torch.testing.assert_close(local_lipschitz(one, x, 0.1), torch.full((3,), expected, dtype=torch.float64))


def test_local_lipschitz_refuses_a_radius_of_nothing(linear):
    with pytest.raises(ValueError, match="eps must be positive"):
        local_lipschitz(linear, torch.rand(1, 1, 4, 4).double(), 0.0)


@pytest.mark.parametrize("norm, dual", [("linf", 1.0), ("l2", 2.0), ("l1", float("inf"))])
def test_linearised_robustness_is_the_distance_to_the_boundary_of_a_linear_classifier(norm, dual, linear):
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3])
    z, weight = linear(x), linear[1].weight
    expected = []
    for i, label in enumerate(y.tolist()):
        others = [j for j in range(5) if j != label]
        slopes = [torch.linalg.vector_norm(weight[label] - weight[j], dual) for j in others]
        expected.append(min((z[i, label] - z[i, j]) / slope for j, slope in zip(others, slopes)))
    torch.testing.assert_close(linearised_robustness(linear, x, y, norm), torch.stack(expected).detach())


def test_linearised_robustness_where_no_logit_moves():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([2.0, 1.0, 1.0])
    x = torch.rand(3, 1, 2, 2)
    found = linearised_robustness(constant, x, torch.tensor([0, 1, 2]))
    assert found.tolist() == [float("inf"), -float("inf"), -float("inf")]
    with pytest.raises(ValueError, match="norm must be one of"):
        linearised_robustness(constant, x, torch.tensor([0, 1, 2]), "l3")


def test_logit_margin(linear):
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    z = linear(x).detach()
    y = torch.tensor([0, 1, 2, 3])
    expected = [float(z[i, y[i]] - max(z[i, j] for j in range(5) if j != y[i])) for i in range(4)]
    torch.testing.assert_close(logit_margin(linear, x, y), torch.tensor(expected, dtype=torch.float64))
