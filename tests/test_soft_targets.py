"""Probabilities in the place of classes, as mixed images have them, in losses with an attack inside."""

import pytest
import torch
from torch import nn

import robustkern as rk
from robustkern import losses
from robustkern.attacks import APGD, FGSM, NFGSM, PGD

EPS = 0.1
LOSSES = {
    "FGSM": losses.AdversarialTraining(FGSM(EPS)),
    "N-FGSM": losses.AdversarialTraining(NFGSM(EPS), weight=0.5, label_smoothing=0.1),
    "PGD": losses.AdversarialTraining(PGD(EPS, steps=2)),
    "TRADES": losses.TRADES(eps=EPS, steps=2),
    "ALP": losses.ALP(PGD(EPS, steps=2)),
    "VAT": losses.VAT(),
    "LLR": losses.LocalLinearity(eps=EPS),
    "GradAlign": losses.GradAlign(eps=EPS),
    "AWP": losses.AWP(losses.TRADES(eps=EPS, steps=2)),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 4, 4, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Softplus(), nn.Linear(12, 4))
    mixed = torch.rand(6, 4, generator=generator)
    return model, x, torch.tensor([0, 1, 2, 3, 0, 1]), mixed / mixed.sum(1, keepdim=True)


def draw():
    return rk.Draw(torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", LOSSES)
def test_certain_probabilities_are_classes(name, batch):
    model, x, y, _ = batch
    hard, soft = (LOSSES[name](model, x, targets, draw()) for targets in (y, nn.functional.one_hot(y).float()))
    parameters = list(model.parameters())
    for mine, theirs in zip(soft[:2], hard[:2], strict=True):
        torch.testing.assert_close(mine, theirs)
    mine, theirs = (torch.autograd.grad(terms.total, parameters) for terms in (soft, hard))
    torch.testing.assert_close(mine, theirs)


def test_the_attack_ascends_the_loss_of_the_mixture(batch):
    model, x, _, mixed = batch
    leaf = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), mixed).backward()
    expected = (x + EPS * leaf.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(EPS, random_start=False)(model, x, mixed), expected)
    terms = losses.AdversarialTraining(FGSM(EPS, random_start=False))(model, x, mixed, draw())
    torch.testing.assert_close(terms.total, nn.functional.cross_entropy(model(expected), mixed))


def test_trades_on_a_mixture(batch):
    """Its attack needs no label: the mixture is in the orientation alone, which is linear in it."""
    model, x, y, _ = batch
    other = y.roll(1)
    mixed = 0.3 * nn.functional.one_hot(y, 4) + 0.7 * nn.functional.one_hot(other, 4)
    one, two, both = (losses.TRADES(eps=EPS, steps=2)(model, x, t, draw()) for t in (y, other, mixed))
    torch.testing.assert_close(both.orientation, 0.3 * one.orientation + 0.7 * two.orientation)
    torch.testing.assert_close(both.smoothness, one.smoothness)


@pytest.mark.parametrize("attack", [PGD(EPS, steps=3), APGD(EPS, steps=4), PGD(EPS, steps=3, early_exit=True)])
def test_the_best_iterate_leaves_the_likeliest_class(attack, batch):
    model, x, _, mixed = batch
    found = attack(model, x, mixed, torch.Generator().manual_seed(0))
    before, after = (nn.functional.cross_entropy(model(images), mixed, reduction="none") for images in (x, found))
    fooled = model(found).argmax(1) != mixed.argmax(1)
    assert bool(((after > before) | fooled).all())


def test_what_takes_one_class_says_so(batch):
    model, x, _, mixed = batch
    with pytest.raises(TypeError, match="MART: y must be integer classes"):
        losses.MART(eps=EPS, steps=1)(model, x, mixed)
    with pytest.raises(TypeError, match="PGD: y must be integer classes"):
        PGD(EPS, loss="dlr")(model, x, mixed)
    with pytest.raises(ValueError, match=r"FGSM: y must be probabilities of 4 classes, got \[6, 3\]"):
        FGSM(EPS)(model, x, mixed[:, :3])
