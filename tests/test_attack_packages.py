"""Our attacks beside those of published packages, on the same model with the same budget."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkern.attacks import APGD, FGSM, PGD

EPS, STEPS = {"linf": 0.1, "l2": 0.65}, 20


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
    # From the sample itself: the laws of the random starts differ.
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
    eps = EPS[norm]
    theirs = torchattacks.APGD(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=STEPS, loss=loss)
    ours = APGD(eps, steps=STEPS, norm=norm, loss=loss)
    reference = robust(model, theirs(x, y), y)
    assert 0.05 < reference < 0.95
    assert abs(robust(model, ours(model, x, y), y) - reference) <= 0.01
