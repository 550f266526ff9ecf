"""Our attacks beside those of published packages, on the same model with the same budget."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkern.attacks import APGD, FGSM, PGD
from robustkern.models import Normalize

EPS, STEPS = {"linf": 0.1, "l2": 0.65}, 20
# In every package, two random starts differ by up to three points; the worst of five starts varies by one.
RESTARTS = 5


@pytest.fixture(scope="module")
def problem():
    """A small network that classifies its own training set, and can be fooled on about half of it."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = torch.rand(6, 1, 8, 8, generator=generator)
    y = torch.arange(300) % 6
    x = (0.5 * centres[y] + 0.25 + 0.08 * torch.randn(300, 1, 8, 8, generator=generator)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def robust(model, adversary, y):
    with torch.no_grad():
        return float((model(adversary).argmax(1) == y).float().mean())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_and_torchattacks(norm, problem):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model, x, y = problem
    eps = EPS[norm]
    theirs = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    # Both start at the sample: the distributions of random starts differ.
    theirs = theirs(model, eps=eps, alpha=eps / 5, steps=STEPS, random_start=False)
    ours = PGD(eps, step_size=eps / 5, steps=STEPS, norm=norm, random_start=False)
    reference = robust(model, theirs(x, y), y)
    assert 0.05 < reference < 0.95
    assert abs(robust(model, ours(model, x, y), y) - reference) <= 0.01


def test_fgsm_and_torchattacks(problem):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model, x, y = problem
    theirs = torchattacks.FGSM(model, eps=EPS["linf"])(x, y)
    torch.testing.assert_close(FGSM(EPS["linf"], random_start=False)(model, x, y), theirs)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_and_torchattacks(norm, loss, problem):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model, x, y = problem
    eps, several = EPS[norm], {"n_restarts": RESTARTS, "seed": 0}
    theirs = torchattacks.APGD(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=STEPS, loss=loss, **several
    )
    ours = APGD(eps, steps=STEPS, norm=norm, loss=loss, restarts=RESTARTS)
    reference = robust(model, theirs(x, y), y)
    assert 0.05 < reference < 0.95
    assert abs(robust(model, ours(model, x, y, torch.Generator().manual_seed(0)), y) - reference) <= 0.01


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_and_pyautoattack(norm, loss, problem):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    model, x, y = problem
    published = {"ce": APGDAttack, "dlr": APGDAttack, "dlr-targeted": APGDAttack_targeted}[loss]
    theirs = published(
        model, n_iter=STEPS, norm={"linf": "Linf", "l2": "L2"}[norm], eps=EPS[norm], seed=0, device="cpu"
    )
    restarts = theirs.n_restarts = RESTARTS
    if loss == "dlr-targeted":
        theirs.n_target_classes = restarts = 4
        theirs.n_restarts = 1
    else:
        theirs.loss = loss
    ours = APGD(EPS[norm], steps=STEPS, norm=norm, loss=loss, restarts=restarts)
    with torch.random.fork_rng():
        reference = robust(model, theirs.perturb(x, y), y)
    assert 0.05 < reference < 0.95
    assert abs(robust(model, ours(model, x, y, torch.Generator().manual_seed(0)), y) - reference) <= 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_foolbox_attacks_our_model(norm, problem):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    model, x, y = problem
    network = nn.Sequential(Normalize((0.5,), (0.25,)), Rescaled(model)).eval()
    attack = (foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD)(
        abs_stepsize=EPS[norm] / 5, steps=STEPS, random_start=False
    )
    _, adversary, fooled = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), x, y, epsilons=EPS[norm])
    reference = 1 - float(fooled.float().mean())
    assert reference == pytest.approx(robust(network, adversary, y), abs=1e-6)
    ours = PGD(EPS[norm], step_size=EPS[norm] / 5, steps=STEPS, norm=norm, random_start=False)
    assert abs(robust(network, ours(network, x, y), y) - reference) <= 0.01


class Rescaled(nn.Module):
    """Undoes a normalisation by 0.5 and 0.25, so that the model behind it is the same function of the image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(0.25 * x + 0.5)
