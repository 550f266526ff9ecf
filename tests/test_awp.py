"""Adversarial weight perturbation: the loss at the worst weights, and the weights as they were."""

import pytest
import torch
from torch import nn

from method_losses import (
    EPS,
    WEIGHT,
    assert_unchanged,
    batch,
    found_by,
    gradients,
    network,
    over_losses,
    prepared,
    rewind,
    snapshot,
    terms_of,
)
from robustkern import losses
from robustkern.attacks import attacked
from robustkern.losses.attack_loss import AttackLoss
from robustkern.sharding import Shard


@over_losses
def test_awp_is_the_loss_at_the_worst_weights(case, device):
    model, (x, y) = network(device), batch(device)
    loss, gamma = prepared(case, device), 0.05
    found = found_by(loss, model, x, y)
    before = snapshot(model)
    rewind(loss)
    grads = dict(zip(dict(model.named_parameters()), gradients(terms_of(loss, model, x, y, found).total, model)))
    moved = network(device)
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if weight.dim() > 1:
                weight += gamma * weight.norm() * grads[name] / grads[name].norm()
    rewind(loss)
    expected = terms_of(loss, moved, x, y, found)
    awp = losses.AWP(_Found(loss, found) if found is not None else loss, gamma)
    rewind(loss)
    terms = awp(model, x, y)
    torch.testing.assert_close(terms.total, expected.total)
    assert terms.total > terms_of(loss, model, x, y, found).total
    for a, e in zip(gradients(terms.total, model), gradients(expected.total, moved), strict=True):
        torch.testing.assert_close(a, e)
    assert_unchanged(model, before)


class _Found(AttackLoss):
    """A loss whose attack is done."""

    def __init__(self, loss, found):
        self.loss, self.found = loss, found

    generator = property(lambda self: self.loss.generator)
    shard = None

    def adversaries(self, model, x, y):
        return self.found

    def terms(self, model, x, adversary, y):
        return self.loss.terms(model, x, adversary, y)


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


def test_awp_keeps_what_a_loss_remembers(device):
    """The same projections at both weights, and one step of `every`."""
    model, (x, y) = network(device), batch(device)
    inner = losses.JacobianPenalty(WEIGHT, 1, EPS, every=2, generator=torch.Generator(device).manual_seed(0))
    awp = losses.AWP(inner, 0.05)
    assert awp(model, x, y).weight == 2 * WEIGHT and inner.step == 1
    assert awp(model, x, y).weight == 0 and inner.step == 2
    awp.step, awp.generator, awp.shard = 5, None, Shard(0, 6, 6)
    assert (inner.step, inner.generator, inner.shard) == (5, None, Shard(0, 6, 6))
    assert not hasattr(losses.AWP(losses.CrossEntropy()), "generator")
    assert losses.AWP(losses.CrossEntropy()).shard is None


def test_awp_without_a_perturbation_is_the_loss(device):
    model, (x, y) = network(device), batch(device)
    assert losses.AWP(losses.CrossEntropy(), 0.0)(model, x, y).total == losses.CrossEntropy()(model, x, y).total


def test_awp_skips_biases_and_frozen_weights(device):
    model, (x, y) = network(device, batch_norm=True), batch(device)
    model[0].weight.requires_grad_(False)
    awp = losses.AWP(losses.CrossEntropy(), 0.05)
    with attacked(nn.Identity()):
        offsets = awp._offsets(model, losses.CrossEntropy()(model, x, y).total)
    assert sorted(offsets) == ["3.weight", "6.weight"]
    for name, offset in offsets.items():
        torch.testing.assert_close(offset.norm(), 0.05 * model.get_parameter(name).norm())
