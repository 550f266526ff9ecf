"""Lazy penalties: the mean over the calls is the loss's own, and what is not penalised costs a plain step."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from method_losses import batch, network
from robustkern import Draw, losses
from robustkern.training import UsageError, recipe, train
from robustkern.training.methods import METHODS, build_loss

EPS = 8 / 255
LOSSES = {
    "gradient penalty": lambda: losses.GradientPenalty(2.0, eps=EPS, label_smoothing=0.1),
    "finite differences": lambda: losses.GradientPenalty(2.0, eps=EPS, estimator="finite-difference"),
    "cure": lambda: losses.CURE(3.0, EPS, label_smoothing=0.2),
    "llr": lambda: losses.LocalLinearity(4.0, eps=EPS),
    "vat": lambda: losses.VAT(1.0, 0.5),
    "llr with perturbed weights": lambda: losses.AWP(losses.LocalLinearity(4.0, eps=EPS), 0.01),
}


def at(step):
    return Draw(torch.Generator().manual_seed(1), step)


def gradients(model, terms):
    model.zero_grad(set_to_none=True)
    terms.backward(inputs=list(model.parameters()))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_the_calls_is_the_loss(name):
    torch.manual_seed(0)
    model, (x, y) = network("cpu").double(), batch("cpu")
    x = x.double()
    terms = LOSSES[name]()(model, x, y, at(0))
    whole = gradients(model, terms)
    lazy = losses.Lazy(LOSSES[name](), 3)
    calls = [lazy(model, x, y, at(step)) for step in range(3)]
    assert [call.weight for call in calls] == [3 * terms.weight, 0, 0]
    assert [call.smoothness.item() for call in calls] == [terms.smoothness.item(), 0, 0]
    each = [gradients(model, call) for call in calls]
    mean, alone = sum(each) / 3, each[1]
    assert (whole - alone).norm() > 1e-3 * whole.norm()  # the penalty matters
    if "perturbed" not in name:
        torch.testing.assert_close(mean, whole)
        assert calls[1].orientation.item() == pytest.approx(terms.orientation.item(), rel=1e-12)
    assert [bool(lazy(model, x, y, at(step)).weight) for step in (4, 6)] == [False, True]  # in any order


def test_what_is_not_penalised_costs_one_pass():
    model, (x, y) = network("cpu"), batch("cpu")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    lazy = losses.Lazy(losses.LocalLinearity(eps=EPS, steps=3), 2)
    lazy(model, x, y, at(0))
    first = len(passes)
    lazy(model, x, y, at(1))
    assert first >= 5 and len(passes) == first + 1


def test_the_step_must_be_known():
    """Otherwise every call would be the first of `every`, and the penalty `every` times too strong."""
    model, (x, y) = network("cpu"), batch("cpu")
    for draw in (None, Draw(torch.Generator())):
        with pytest.raises(
            ValueError, match=r"Lazy: draw must say which step this is, such as robustkern.Draw\(step=3"
        ):
            losses.Lazy(losses.CURE(), 2)(model, x, y, draw)
    assert losses.Lazy(losses.CURE(), 1)(model, x, y).weight == losses.CURE().weight
    for step in (-1, 1.5, "2"):
        with pytest.raises(ValueError, match="Draw: step must be an integer of at least 0"):
            Draw(step=step)


def test_the_loss_on_the_other_steps():
    inner = losses.LocalLinearity(eps=EPS)
    smoothed = losses.Lazy(losses.AWP(losses.GradientPenalty(label_smoothing=0.3, impl="reference")), 2)
    assert smoothed.orientation == losses.CrossEntropy(0.3, impl="reference")
    other = losses.LabelSmoothing(0.5)
    assert losses.Lazy(inner, 2, other).orientation is other


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_number_of_calls(every):
    with pytest.raises(ValueError, match=r"Lazy: every must be an integer of at least 1, got "):
        losses.Lazy(losses.CURE(), every)


@pytest.mark.long
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "every" in method.options])
def test_every_method_with_the_option(method, tmp_path):
    """The option reaches the loss: smoothness is shown though not every step measures it, and the weights change."""
    assert getattr(build_loss(method, {}, eps=EPS, impl="auto"), "every", 1) == 1
    assert build_loss(method, {"every": 4}, eps=EPS, impl="auto").every == 4
    settings = {"epochs": 1, "batch_size": 32, "train_samples": 96, "eval_samples": 10, "pgd_steps": 1, "threads": 1}
    config = recipe("digits", method, **settings)
    weights, rows = {}, {}
    for every in (1, 2, 3):
        lazy = dataclasses.replace(config, options={**config.options, "every": every})
        result = train(lazy, tmp_path / str(every))
        weights[every] = nn.utils.parameters_to_vector(result.model.parameters())
        rows[every] = result.rows[-1]
    assert len({value.sum().item() for value in weights.values()}) == 3
    assert all(row["smoothness"] > 0 for row in rows.values())


def test_a_run_that_is_older_than_an_option_goes_on(tmp_path):
    """An option that its configuration does not name has its default."""
    settings = {"epochs": 1, "batch_size": 32, "train_samples": 64, "eval_samples": 10, "pgd_steps": 1, "threads": 1}
    config = recipe("digits", "gradient-penalty", **settings)
    rows = train(config, tmp_path).rows
    path = tmp_path / "config.yaml"
    text, found = re.subn(r"^  every: 1\n", "", path.read_text(), flags=re.MULTILINE)
    assert found == 1
    path.write_text(text)
    assert len(train(config, tmp_path, resume=True).rows) == len(rows)
    other = dataclasses.replace(config, options={**config.options, "every": 2})
    with pytest.raises(UsageError, match="written with other settings: every 1 -> 2"):
        train(other, tmp_path, resume=True)
