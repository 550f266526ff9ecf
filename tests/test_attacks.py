"""PGD: stays in its ball, finds higher losses, leaves the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkern import models
from robustkern.attacks import PGD, attacked


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = models.create("small-cnn", 10, (1, 8, 8))
    x, y = torch.rand(20, 1, 8, 8), torch.randint(10, (20,))
    x[0], x[1] = 0, 1  # corners of the box
    return model, x, y


def loss_of(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("eps", [0.1, 8 / 255, 0.7, torch.tensor(0.05), torch.full((1, 1, 1), 0.2)])
@pytest.mark.parametrize("random_start", [True, False])
def test_stays_in_the_ball_and_the_box(problem, eps, random_start):
    model, x, y = problem
    adversary = PGD(eps, steps=5, random_start=random_start)(model, x, y)
    assert (adversary - x).abs().max() <= float(torch.as_tensor(eps).max()) + 1e-6
    assert adversary.min() >= 0 and adversary.max() <= 1
    assert not adversary.requires_grad and adversary.grad_fn is None


def test_every_loss_increases_and_steps_and_restarts_help(problem):
    model, x, y = problem
    clean = loss_of(model, x, y)
    from_x = loss_of(model, PGD(0.1, steps=10, random_start=False)(model, x, y), y)
    assert (from_x >= clean).all() and from_x.mean() > clean.mean()
    gen = torch.Generator().manual_seed(0)
    one = loss_of(model, PGD(0.1, steps=10)(model, x, y, gen), y)
    gen = torch.Generator().manual_seed(0)
    four = loss_of(model, PGD(0.1, steps=10, restarts=4)(model, x, y, gen), y)
    assert (four >= one).all()


def test_finds_the_corner_of_a_linear_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x, y = torch.full((6, 1, 4, 4), 0.5), torch.tensor([0, 1] * 3)
    adversary = PGD(0.1, steps=20)(model, x, y)
    weight = model[1].weight[1] - model[1].weight[0]
    direction = torch.where(y[:, None] == 0, 1.0, -1.0) * weight.sign()
    torch.testing.assert_close(adversary.flatten(1), 0.5 + 0.1 * direction)


def test_zero_eps_changes_nothing(problem):
    model, x, y = problem
    assert torch.equal(PGD(0.0, steps=3)(model, x, y), x)


def test_reproducible_from_its_generator_and_not_from_the_global_one(problem):
    model, x, y = problem
    attack = PGD(0.1, steps=3)

    def run(seed):
        return attack(model, x, y, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))


def test_does_not_touch_its_arguments_or_parameter_gradients(problem):
    model, x, y = problem
    copy = x.clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    PGD(0.1, steps=2)(model, x.requires_grad_(True), y)
    assert torch.equal(x, copy) and x.grad is None
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())


def test_runs_under_no_grad_and_in_eval_mode_and_restores_modes(problem):
    _, x, y = problem
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    model[1].eval()  # frozen by its owner: not to be thawed
    model[3].bias.requires_grad_(False)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        adversary = PGD(0.1, steps=3)(model, x, y)
    assert not torch.equal(adversary, x)
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


def test_restores_modes_after_an_exception(problem):
    _, x, y = problem

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 10)

        def forward(self, x):
            assert not self.training and not self.inner.weight.requires_grad
            raise RuntimeError("boom")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="boom"):
        PGD(0.1)(model, x, y)
    assert model.training and model.inner.training
    assert model.inner.weight.requires_grad and model.inner.bias.requires_grad


def test_restored_even_when_eval_itself_fails():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    with pytest.raises(RuntimeError, match="no"), attacked(model):
        pass
    assert all(module.training for module in model.modules())


def test_a_non_finite_loss_is_the_attackers_success():
    class Fragile(nn.Module):
        def forward(self, x):
            z = x.flatten(1).sum(1, keepdim=True)
            return torch.where(z > 8.3, torch.nan, 1.0) * torch.cat([-z, z], dim=1)

    x, y = torch.full((3, 1, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    adversary = PGD(0.1, steps=5)(Fragile(), x, y)
    assert Fragile()(adversary).isnan().all()


@pytest.mark.parametrize("arguments", [{"norm": "l3"}, {"loss": "mse"}, {"steps": 0}, {"restarts": 0}, {"eps": -0.1}])
def test_wrong_use(arguments):
    with pytest.raises(ValueError, match="PGD"):
        PGD(**{"eps": 0.1, **arguments})
