"""PGD: stays in its ball, finds higher losses, leaves the model as it was."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkern import models
from robustkern.attacks import APGD, FGSM, NFGSM, PGD, attacked


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
    model[1].eval()  # frozen by its owner: must stay so
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


# ------------------------------------------------------------------ the model is left unchanged


class Watched(nn.Module):
    """A network with every kind of state; it can fail in a given pass."""

    def __init__(self, fail_at=None, error=RuntimeError):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 64, 10)
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.fail_at, self.error, self.passes = fail_at, error, 0

    def forward(self, x):
        assert not self.training
        assert not any(parameter.requires_grad for parameter in self.parameters())
        self.calls += 1  # state that even eval mode changes
        self.passes += 1
        if self.passes == self.fail_at:
            raise self.error("stop")
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


ATTACKS = [PGD(0.1, steps=3, early_exit=True), FGSM(0.1), NFGSM(0.1), APGD(0.1, steps=4), PGD(0.5, norm="l2", steps=3)]


def state_of(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return values, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_state(model, state):
    values, modes, flags = state
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_state_is_restored_whatever_happens(problem, attack, error):
    _, x, y = problem
    model = Watched(fail_at=1 if isinstance(attack, (FGSM, NFGSM)) else 2, error=error) if error else Watched()
    model.train()
    model.norm.eval()  # frozen by its owner
    state = state_of(model)
    if error is None:
        attack(model, x, y)
    else:
        with pytest.raises(error, match="stop"):
            attack(model, x, y)
    assert_state(model, state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_no_parameter_gradient_is_computed(problem, attack):
    model, x, y = problem
    computed = []
    for parameter in model.parameters():
        parameter.register_hook(computed.append)
    attack(model, x, y)
    assert not computed


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(problem, attack, mode):
    model, x, y = problem
    expected = attack(model, x, y, torch.Generator().manual_seed(0))
    with mode():
        adversary = attack(model, x.clone(), y.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(adversary, expected)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.rand(2, 1, 8, 8) * 255, torch.tensor([0, 1]), ValueError, r"x must be in \[0, 1\], got values from"),
        (torch.full((2, 1, 8, 8), torch.nan), torch.tensor([0, 1]), ValueError, "x must be finite"),
        (torch.ones(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), TypeError, "divide bytes by 255"),
        (torch.rand(2, 1, 8, 8), torch.tensor([0.0, 1.0]), TypeError, "y must be integer classes"),
        (torch.rand(2, 1, 8, 8), torch.tensor([0]), ValueError, r"y must have shape \[2\], got \[1\]"),
    ],
)
@pytest.mark.parametrize("attack", [PGD(0.1), FGSM(0.1), NFGSM(0.1), APGD(0.1)], ids=lambda a: type(a).__name__)
def test_wrong_batches(problem, attack, x, y, error, message):
    with pytest.raises(error, match=f"{type(attack).__name__}: .*{message}"):
        attack(problem[0], x, y)


def test_a_model_that_gives_no_logits(problem):
    _, x, y = problem
    with pytest.raises(ValueError, match=r"PGD: model must give logits \[20, classes\], got \[20, 1, 8, 8\]"):
        PGD(0.1)(nn.Identity(), x, y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APGD(0.1, norm="l1"), "APGD: norm must be one of 'linf', 'l2', got 'l1'"),
        (lambda: APGD(0.1, loss="kl"), "APGD: loss must be one of 'ce', 'cw', 'dlr', 'dlr-targeted', got 'kl'"),
        (lambda: PGD(torch.ones(3), norm="l2"), r"PGD: eps must be one number for norm 'l2', got shape \[3\]"),
        (lambda: FGSM(float("nan")), "FGSM: eps must be finite and not negative"),
        (lambda: NFGSM(0.1, noise=-1.0), r"NFGSM: noise must be a number in \[0, inf\), got -1.0"),
        (lambda: FGSM(0.1, -0.01), "FGSM: step_size must be finite and positive.* got -0.01"),
        (lambda: NFGSM(0.1, 0.0), "NFGSM: step_size must be finite and positive.* got 0.0"),
        (lambda: PGD(0.1, float("nan")), "PGD: step_size must be finite and positive.* got nan"),
        (
            lambda: PGD(0.1, torch.tensor([0.1, -0.1])),
            r"PGD: step_size must be finite and positive.* got tensor\(",
        ),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_default_step_of_pgd_crosses_the_ball():
    """2.5 eps / steps: after two of ten steps along a straight slope, half of eps."""
    seen = []

    def straight(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)

    x, y = torch.full((3, 1, 2, 2), 0.5), torch.ones(3, dtype=torch.long)
    PGD(0.2, steps=10, random_start=False)(straight, x, y)
    torch.testing.assert_close(seen[2] - x, torch.full_like(x, 0.1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3], ids=str)
def test_images_in_any_order_of_memory(problem, norm, order):
    """Including a layout with the samples innermost, as files that are stored by columns give it."""
    model, x, y = problem
    laid = x.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    attack = PGD(0.1, steps=3, norm=norm, random_start=False)
    torch.testing.assert_close(attack(model, laid, y), attack(model, x, y))
