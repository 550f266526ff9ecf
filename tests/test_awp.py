"""Adversarial weight perturbation: the loss at the worst weights, and the weights as they were."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from method_losses import (
    EPS,
    WEIGHT,
    assert_unchanged,
    batch,
    drawn,
    found_by,
    gradients,
    network,
    over_losses,
    prepared,
    snapshot,
    terms_of,
)
from robustkern import Draw, losses
from robustkern.attacks import attacked
from robustkern.losses.attack_loss import AttackLoss
from robustkern.sharding import Shard


@over_losses
def test_awp_is_the_loss_at_the_worst_weights(case, device):
    model, (x, y) = network(device), batch(device)
    loss, gamma = prepared(case, device), 0.05
    found = found_by(loss, model, x, y, drawn(device))
    before = snapshot(model)
    still = terms_of(loss, model, x, y, found, drawn(device, 11))
    grads = dict(zip(dict(model.named_parameters()), gradients(still.total, model)))
    moved = network(device)
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if weight.dim() > 1:
                weight += gamma * weight.norm() * grads[name] / grads[name].norm()
    expected = terms_of(loss, moved, x, y, found, drawn(device, 11))
    awp = losses.AWP(_Found(loss, found) if found is not None else loss, gamma)
    terms = awp(model, x, y, drawn(device, 11))
    torch.testing.assert_close(terms.total, expected.total)
    assert terms.total > still.total
    for a, e in zip(gradients(terms.total, model), gradients(expected.total, moved), strict=True):
        torch.testing.assert_close(a, e)
    assert_unchanged(model, before)


@dataclasses.dataclass(frozen=True)
class _Found(AttackLoss):
    """A loss whose attack has already run."""

    loss: AttackLoss
    found: Any

    def adversaries(self, model, x, y, draw):
        return self.found

    def terms(self, model, x, adversary, y, draw):
        return self.loss.terms(model, x, adversary, y, draw)


@pytest.mark.parametrize("at", range(6))
def test_awp_leaves_the_weights_alone_whatever_happens(at, device):
    model, (x, y) = network(device, batch_norm=True), batch(device)
    before, calls = snapshot(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt

    model[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        losses.AWP(losses.TRADES(eps=EPS, steps=1))(model, x, y).backward()
    before.pop("1.num_batches_tracked"), before.pop("1.running_mean"), before.pop("1.running_var")
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert model[1].track_running_stats


def test_a_loss_draws_the_same_at_both_weights(device):
    """The same projections, the same rows, and the same step of `every`; the generator ends as after one of them."""
    model, (x, y) = network(device), batch(device)
    penalty, seen = losses.JacobianPenalty(WEIGHT, 1, EPS), []

    def loss(model, x, y, draw):
        seen.append((draw, draw.generator.get_state()))
        return penalty(model, x, y, draw)

    draw, once = Draw(torch.Generator(device).manual_seed(0), 4, Shard(0, 6, 6)), drawn(device, 0)
    losses.AWP(loss, 0.05)(model, x, y, draw)
    penalty(model, x, y, once)
    (first, before), (second, again) = seen
    assert first is second is draw and torch.equal(before, again)
    assert torch.equal(draw.generator.get_state(), once.generator.get_state()) and not torch.equal(
        before, draw.generator.get_state()
    )
    lazy = losses.AWP(losses.Lazy(penalty, 2), 0.05)
    assert [lazy(model, x, y, Draw(step=step)).weight for step in (4, 5)] == [2 * WEIGHT, 0]


def test_awp_without_a_perturbation_is_the_loss(device):
    model, (x, y) = network(device), batch(device)
    assert losses.AWP(losses.CrossEntropy(), 0.0)(model, x, y).total == losses.CrossEntropy()(model, x, y).total


def test_awp_skips_biases_and_frozen_weights(device):
    model, (x, y) = network(device, batch_norm=True), batch(device)
    model[0].weight.requires_grad_(False)
    awp = losses.AWP(losses.CrossEntropy(), 0.05)
    with attacked(nn.Identity()):
        offsets = awp._offsets(model, losses.CrossEntropy()(model, x, y).total, Draw())
    assert sorted(offsets) == ["3.weight", "6.weight"]
    for name, offset in offsets.items():
        torch.testing.assert_close(offset.norm(), 0.05 * model.get_parameter(name).norm())
