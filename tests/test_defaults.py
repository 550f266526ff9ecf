"""What a call without options does: the papers' values.  A default that moves moves every result that names none."""

import inspect

import pytest

from robustkern import attacks, losses
from robustkern.attacks import APGD, PGD
from robustkern.evaluation import suite

EPS = 8 / 255
TRAINING = PGD(EPS, step_size=2 / 255, steps=10)

# name: the defaults that are numbers, words or attacks; whether a kernel runs is no part of the result
LOSSES = {
    "ALP": {"attack": TRAINING, "weight": 0.5},
    "AWP": {"gamma": 0.01},
    "AdversarialTraining": {"attack": TRAINING, "weight": 1.0, "label_smoothing": 0.0},
    "CURE": {"weight": 4.0, "eps": EPS, "squared": True, "label_smoothing": 0.0},
    "CrossEntropy": {"label_smoothing": 0.0, "temperature": 1.0},
    "CrossLipschitz": {
        "weight": 1e-4, "projections": 1, "eps": 1.0, "law": "orthonormal", "fraction": 1.0, "label_smoothing": 0.0
    },
    "Distillation": {"temperature": 100.0},
    "FisherPenalty": {
        "weight": 0.5, "projections": 1, "eps": EPS, "law": "orthonormal", "fraction": 1.0, "label_smoothing": 0.0
    },
    "GradAlign": {"weight": 0.2, "eps": EPS, "step_size": None},
    "GradientPenalty": {
        "weight": 1.0, "p": 1.0, "eps": EPS, "squared": False, "label_smoothing": 0.0, "estimator": "exact", "h": 0.1
    },
    "JacobianPenalty": {
        "weight": 0.005, "projections": 1, "eps": 1.0, "law": "orthonormal", "fraction": 1.0, "label_smoothing": 0.0,
        "squared": True,
    },
    "LabelSmoothing": {"weight": 0.1},
    "Lazy": {"orientation": None},
    "LocalLinearity": {
        "weight": 4.0, "ratio": 0.75, "eps": EPS, "step_size": None, "steps": 2, "norm": "linf", "start": "uniform"
    },
    "MART": {"weight": 5.0, "eps": EPS, "step_size": None, "steps": 10, "norm": "linf", "start": "gaussian"},
    "TRADES": {"weight": 6.0, "eps": EPS, "step_size": None, "steps": 10, "norm": "linf", "start": "gaussian"},
    "VAT": {"weight": 1.0, "eps": 1.0, "xi": 1.0, "steps": 1, "norm": "l2"},
}  # fmt: skip
LINF = {"norm": "linf", "random_start": True, "loss": "ce"}
ATTACKS = {
    "APGD": LINF | {"steps": 100, "restarts": 1},
    "FGSM": LINF | {"step_size": None, "targeted": False, "coordinates": 1},
    "NFGSM": {"step_size": None, "noise": 2.0, "loss": "ce"},
    "PGD": LINF | {
        "step_size": None, "steps": 20, "restarts": 1, "targeted": False, "early_exit": False, "coordinates": 1
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "module, name, expected",
    [(module, *row) for module, rows in ((losses, LOSSES), (attacks, ATTACKS)) for row in rows.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_defaults(module, name, expected):
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "impl"}
    assert {key: given[key] for key in expected} == expected


def test_every_loss_and_attack_is_named_here():
    made = {name for name in losses.__all__ if inspect.isclass(getattr(losses, name))}
    assert made == set(LOSSES)
    assert {name for name in attacks.__all__ if inspect.isclass(getattr(attacks, name))} == set(ATTACKS)


@pytest.mark.parametrize("classes", [3, 10])
def test_seeds_of_two_evaluations_never_meet(classes, monkeypatch):
    """Attacks of one evaluation draw from streams of their own, and not from another evaluation's."""
    seeds = []
    monkeypatch.setattr(suite, "_seeded", lambda attack, seed: seeds.append((type(attack), seed)))
    settings = suite.Settings(eps=EPS, seed=3, attacks=("pgd", "apgd"))
    list(suite._attacks(settings, classes))
    assert seeds == [(PGD, 3000), (APGD, 3001), (APGD, 3002)]
