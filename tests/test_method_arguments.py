"""Arguments of the losses that make no sense."""

import math

import pytest
import torch
from torch import nn

from method_losses import (
    batch,
    network,
    over_losses,
    teacher,
)
from robustkern import losses
from robustkern.attacks import PGD


@over_losses
def test_weights_are_checked(case):
    with pytest.raises(ValueError, match=r"weight must be|temperature must be"):
        case.make(weight=-1.0) if case.name != "Distillation" else losses.Distillation(teacher(), 0.0)


@pytest.mark.parametrize("estimator", ["exact", "finite-difference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.5}, "p must be 1, 2, inf or any number >= 1, got 0.5"),
        ({"p": math.nan}, "p must be 1, 2, inf or any number >= 1, got nan"),
        ({"p": 1.0, "squared": True}, "squared needs p = 2, got p = 1.0"),
        ({"eps": -0.1}, "eps must be finite and not negative.* got -0.1"),
        (
            {"eps": torch.tensor([0.1, math.nan])},
            "eps must be finite and not negative.* got tensor",
        ),
    ],
    ids=str,
)
def test_gradient_penalties_refuse_the_same_however_estimated(options, message, estimator):
    with pytest.raises(ValueError, match=f"GradientPenalty: {message}"):
        losses.GradientPenalty(estimator=estimator, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.TRADES(eps=-0.1), "TRADES: eps must be finite and not negative"),
        (lambda: losses.MART(steps=0), "MART: steps must be an integer of at least 1, got 0"),
        (lambda: losses.TRADES(norm="l3"), "TRADES: norm must be one of"),
        (lambda: losses.LocalLinearity(start="zero"), "LocalLinearity: start must be one of 'gaussian', 'uniform'"),
        (lambda: losses.LocalLinearity(ratio=-1.0), "LocalLinearity: ratio must be"),
        (lambda: losses.VAT(norm="l1"), "VAT: norm must be one of 'l2', 'linf', got 'l1'"),
        (lambda: losses.VAT(xi=0.0), r"VAT: xi must be a number in \(0, inf\), got 0.0"),
        (lambda: losses.GradAlign(eps=-1.0), "GradAlign: eps must be finite and not negative"),
        (lambda: losses.LabelSmoothing(1.5), r"LabelSmoothing: weight must be in \[0, 1\], got 1.5"),
        (lambda: losses.GradientPenalty(estimator="fd"), "GradientPenalty: estimator must be one of 'exact', "),
        (lambda: losses.GradientPenalty(h=0.0), r"GradientPenalty: h must be a number in \(0, inf\), got 0.0"),
        (
            lambda: losses.TRADES(step_size=-0.1),
            "TRADES: step_size must be finite and positive.* got -0.1",
        ),
        (
            lambda: losses.MART(step_size=0.0),
            "MART: step_size must be finite and positive.* got 0.0",
        ),
        (
            lambda: losses.LocalLinearity(step_size=torch.tensor(math.nan)),
            "LocalLinearity: step_size must be finite and positive",
        ),
        (
            lambda: losses.GradAlign(step_size=math.nan),
            "GradAlign: step_size must be finite and positive.* got nan",
        ),
        (lambda: losses.CURE(eps=-0.1), "CURE: eps must be finite and not negative.* got -0.1"),
        (
            lambda: losses.JacobianPenalty(eps=math.nan),
            "JacobianPenalty: eps must be finite and not negative.* got nan",
        ),
        (lambda: losses.JacobianPenalty(-1.0), r"JacobianPenalty: weight must be a number in \[0, inf\), got -1"),
        (lambda: losses.FisherPenalty(math.nan), "FisherPenalty: weight must be a number in"),
        (lambda: losses.CrossLipschitz(-1.0), "CrossLipschitz: weight must be a number in"),
        (lambda: losses.AWP(losses.CrossEntropy(), -0.1), "AWP: gamma must be"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_kinds_are_refused(device):
    model, (x, y) = network(device), batch(device)
    with pytest.raises(TypeError, match="Distillation: teacher must be a module, got str"):
        losses.Distillation("teacher.pt")
    with pytest.raises(TypeError, match="AdversarialTraining: attack must be callable, got float"):
        losses.AdversarialTraining(0.1)
    with pytest.raises(TypeError, match="AWP: model must be an nn.Module"):
        losses.AWP(losses.CrossEntropy())(lambda v: model(v), x, y)
    with pytest.raises(ValueError, match=r"Distillation: teacher gives logits of shape \[6, 2\], the model \[6, 5\]"):
        losses.Distillation(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).to(device, x.dtype))(model, x, y)
    for loss in (losses.TRADES(), losses.VAT(), losses.GradAlign(), losses.AdversarialTraining(PGD(0.1))):
        with pytest.raises(ValueError, match=r"x must be in \[0, 1\]"):
            loss(model, x - 1, y)
        with pytest.raises(TypeError, match="x must be a floating-point tensor"):
            loss(model, (255 * x).byte(), y)
    with pytest.raises(TypeError, match="CURE: x must be a floating-point tensor"):
        losses.CURE()(model, x.byte(), y)
