"""The published losses: each equals its formula, leaves the model as documented, and means the same for every batch."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from method_losses import (
    EPS,
    PLAIN,
    WEIGHT,
    assert_unchanged,
    batch,
    drawn,
    found_by,
    gradients,
    kl,
    network,
    over_attacked,
    over_losses,
    prepared,
    snapshot,
    teacher,
    terms_of,
)
from robustkern import Draw, losses
from robustkern.attacks import FGSM
from robustkern.losses._passes import frozen_statistics
from robustkern.sharding import Shard


@over_losses
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_terms_and_parameter_gradients_are_those_of_the_formula(case, impl, device):
    model, (x, y) = network(device), batch(device)
    loss = prepared(case, device, impl=impl)
    found = found_by(loss, model, x, y, drawn(device))
    orientation, smoothness = case.formula(model, x, y, found, loss, drawn(device, 11))
    weight = WEIGHT if smoothness.requires_grad else 0.0
    expected = gradients(orientation + weight * smoothness, model)
    terms = terms_of(loss, model, x, y, found, drawn(device, 11))
    torch.testing.assert_close(terms.orientation, orientation)
    torch.testing.assert_close(terms.smoothness, smoothness)
    assert terms.weight == weight
    for a, e in zip(gradients(terms.total, model), expected, strict=True):
        torch.testing.assert_close(a, e)
    if weight:
        share = torch.cat([g.flatten() for g in gradients(terms.smoothness, model)])
        assert WEIGHT * share.norm() > 1e-3 * torch.cat([g.flatten() for g in expected]).norm()
    terms.backward(inputs=model.parameters())
    for parameter, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(e) if parameter.grad is None else parameter.grad, e)
    assert x.grad is None and not x.requires_grad


class Twice(Shard):
    """The rows of a batch of six, each twice."""

    def samples(self, device="cpu"):
        return torch.arange(6, device=device).repeat(2)


@over_losses
def test_the_weight_means_the_same_for_every_batch_size(case, device):
    model, (x, y) = network(device), batch(device)
    loss = prepared(case, device)
    found = found_by(loss, model, x, y, drawn(device))

    def twice(value):
        if isinstance(value, tuple):
            return tuple(twice(v) for v in value)
        return torch.cat([value, value]) if isinstance(value, torch.Tensor) else value

    once = terms_of(loss, model, x, y, found, drawn(device, 11))
    doubled = terms_of(loss, model, twice(x), twice(y), twice(found), drawn(device, 11, Twice(0, 12, 12)))
    torch.testing.assert_close(doubled.orientation, once.orientation)
    torch.testing.assert_close(doubled.smoothness, once.smoothness)
    for a, e in zip(gradients(doubled.total, model), gradients(once.total, model), strict=True):
        torch.testing.assert_close(a, e)


@over_losses
def test_passes_and_batch_norm_are_as_documented(case, device):
    model, (x, y) = network(device, batch_norm=True), batch(device)
    model[5].eval()  # a module that its owner has frozen
    model[0].bias.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    loss = prepared(case, device)
    terms = loss(model, x, y)
    terms.backward(inputs=[p for p in model.parameters() if p.requires_grad])
    again = loss.weight != 1 if isinstance(loss, losses.AdversarialTraining) else 0  # its orientation's backward pass
    assert len(calls) == case.forwards + again
    assert model[1].num_batches_tracked == case.updates
    assert [m.training for m in model] == [True] * 5 + [False] + [True]
    assert all(m.track_running_stats for m in model if isinstance(m, nn.BatchNorm2d))
    assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * 6
    if hasattr(loss, "teacher"):
        assert loss.teacher.training and loss.teacher[1].num_batches_tracked == 0
        assert all(p.requires_grad and p.grad is None for p in loss.teacher.parameters())


def test_the_running_statistics_of_adversarial_training_are_those_of_the_adversaries(device):
    model, other, (x, y) = network(device, batch_norm=True), network(device, batch_norm=True), batch(device)
    loss = prepared(next(c for c in _cases() if c.name == "PGD"), device)
    found = loss.adversaries(model, x, y, Draw())
    loss.terms(model, x, found, y, Draw()).backward()
    other(found)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
    torch.testing.assert_close(model[1].running_var, other[1].running_var)


def _cases():
    return over_losses.args[1]


@over_losses
def test_bfloat16_autocast(case, device):
    """With autocast's cache, too: a pass without a graph must not leave its cast weights to a pass with one."""
    model, (x, y) = network(device, torch.float32, batch_norm=True), batch(device, torch.float32)
    loss = prepared(case, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        terms = loss(model, x, y)
    assert terms.orientation.dtype == terms.smoothness.dtype == torch.float32
    assert terms.total.isfinite()
    terms.backward(inputs=model.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model[:-1].parameters())
    assert model[0].weight.grad.any()
    assert abs(terms.total - loss(model, x, y).total) < 0.5 * terms.total.abs()


@over_attacked
def test_the_model_sees_images_only_and_the_attack_gains(case, device):
    model, (x, y) = network(device), batch(device)
    x = (1.4 * x - 0.2).clamp(0, 1)  # many at the ends
    loss = prepared(case, device)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss(model, x, y)
    handle.remove()
    assert all(v.min() >= 0 and v.max() <= 1 for v in seen)
    found = found_by(loss, model, x, y, Draw())
    image = found[0] if isinstance(found, tuple) else found
    reach = 3 * EPS if case.name == "N-FGSM" else EPS
    assert 0 < (image - x).abs().max() <= reach * (1 + 1e-6) and not image.requires_grad
    smoothness = terms_of(loss, model, x, y, found, Draw()).smoothness
    assert smoothness > 0
    if case.name != "GradAlign":  # nothing is found by chance
        noise = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
        assert smoothness > terms_of(loss, model, x, y, noise, Draw()).smoothness


@over_attacked
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_processes_that_share_a_batch_find_what_one_finds(case, impl, device):
    model, (x, y) = network(device), batch(device)
    loss = prepared(case, device, impl=impl)
    draw = drawn(device)
    whole = found_by(loss, model, x, y, draw)
    whole_terms = terms_of(loss, model, x, y, whole, draw)
    parts, smoothness = [], 0.0
    for rank in range(4):  # of 1, 2, 1 and 2 rows
        shard = Shard.of(rank, 4, len(x))
        rows, draw = (shard.rows(x), shard.rows(y)), drawn(device, shard=shard)
        parts.append(found_by(loss, model, *rows, draw))
        smoothness += shard.share * terms_of(loss, model, *rows, parts[-1], draw).smoothness
    for index in range(2 if isinstance(whole, tuple) else 1):
        pieces = [part[index] if isinstance(part, tuple) else part for part in parts]
        torch.testing.assert_close(torch.cat(pieces), whole[index] if isinstance(whole, tuple) else whole)
    torch.testing.assert_close(smoothness, whole_terms.smoothness)


@over_losses
def test_nothing_is_differentiated_without_grad_mode(case, device):
    model, (x, y) = network(device), batch(device)
    loss = prepared(case, device)
    expected = loss(model, x, y, drawn(device))
    with torch.no_grad():
        terms = loss(model, x, y, drawn(device))
    assert not terms.total.requires_grad
    torch.testing.assert_close(terms.smoothness, expected.smoothness)


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_orientation_of_adversarial_training_is_differentiated_where_it_counts(weight, device):
    """Its backward pass is deferred, and must come whatever the weight is, given or set afterwards."""
    model, (x, y) = network(device), batch(device)
    loss = losses.AdversarialTraining(FGSM(EPS), 1.0)
    found = loss.adversaries(model, x, y, Draw())
    terms = loss.terms(model, x, found, y, Draw())._replace(weight=weight)
    expected = (1 - weight) * F.cross_entropy(model(x), y) + weight * F.cross_entropy(model(found), y)
    for a, e in zip(gradients(terms.total, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(a, e)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(terms.orientation, list(model.parameters()), create_graph=True)


def test_half_of_either_is_goodfellows_loss(device):
    model, (x, y) = network(device), batch(device)
    attack = FGSM(EPS, random_start=False)
    terms = losses.AdversarialTraining(attack, 0.5)(model, x, y)
    expected = (F.cross_entropy(model(x), y) + F.cross_entropy(model(attack(model, x, y)), y)) / 2
    torch.testing.assert_close(terms.total, expected)


def test_label_smoothing_is_that_of_pytorch(device):
    model, (x, y) = network(device), batch(device)
    total = losses.LabelSmoothing(0.1)(model, x, y).total
    torch.testing.assert_close(total, F.cross_entropy(model(x), y, label_smoothing=0.1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_frozen_statistics_change_nothing_but_the_statistics(norm, training, device):
    layer = norm(3, track_running_stats=True).to(device, torch.float64).train(training)
    x, _ = batch(device)
    layer(0.5 * x)  # so that the statistics are not those of a new layer
    before, expected = snapshot(layer), copy.deepcopy(layer)(x)
    with frozen_statistics(layer):
        assert torch.equal(layer(x), expected)
    assert_unchanged(layer, before)
    assert layer.track_running_stats
    layer(x)
    assert torch.equal(layer.running_mean, before["running_mean"]) is not training


def test_a_teacher_goes_to_the_device_of_the_images():
    """Here the device is "meta", which has no memory."""
    loss = losses.Distillation(teacher(dtype=torch.float32), impl="reference")
    x = torch.rand(2, 3, 6, 6, device="meta")
    terms = loss(network("meta", torch.float32), x, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert terms.orientation.device == x.device == loss.teacher[2].weight.device


def test_identical_images_have_no_divergence(device):
    model, (x, y) = network(device, torch.float32), batch(device, torch.float32)
    for loss in (losses.TRADES(), losses.MART(), losses.VAT()):
        assert loss.terms(model, x, x, y, Draw()).smoothness == 0


def test_mart_weighs_by_doubt(device):
    """A sample that is certainly right counts nothing; one that is certainly wrong counts fully."""
    model, dtype = nn.Flatten(), torch.float64
    logits = torch.zeros(2, 5, device=device, dtype=dtype)
    logits[:, 2] = 200.0
    moved = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)
    divergence = kl(logits, moved)
    for label, doubt in ((2, 0.0), (3, 1.0)):
        terms = losses.MART().terms(model, logits, moved, torch.tensor([label, label], device=device), Draw())
        torch.testing.assert_close(terms.smoothness, doubt * divergence.mean())
    assert losses.MART().terms(model, moved, logits, torch.tensor([2, 2], device=device), Draw()).total.isfinite()


def test_grad_align_leaves_out_samples_without_a_direction(device):
    model, (x, y) = network(device), batch(device)
    loss = losses.GradAlign(WEIGHT, EPS)
    _, first, _ = loss.adversaries(model, x, y, Draw())
    every = loss._misalignment(first, torch.randn_like(first))
    first[2] = 0
    second = torch.randn_like(first)
    second[4] = 0
    some = loss._misalignment(first, second.requires_grad_())
    assert some[[2, 4]].tolist() == [0, 0] and (some[[0, 1, 3, 5]] > 0).all() and (every > 0).all()
    (grad,) = torch.autograd.grad(some.sum(), second)
    assert grad.isfinite().all() and not grad[[2, 4]].any() and grad[0].any()
    constant = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).to(device, x.dtype)
    nn.init.zeros_(constant[1].weight)
    assert losses.GradAlign()(constant, x, y).smoothness == 0


def test_grad_align_of_a_linear_loss_is_zero(device):
    model, (x, y) = network(device), batch(device)
    loss = losses.GradAlign(WEIGHT, 1e-7)
    assert loss(model, x, y).smoothness < 1e-6 < losses.GradAlign(WEIGHT, EPS)(model, x, y).smoothness


def test_vat_finds_the_direction_of_largest_divergence(device):
    """The leading eigenvector of the divergence's Hessian, for a linear model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(device, torch.float64)
    x = torch.full([1, 3, 2, 2], 0.5, device=device, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.long, device=device)
    found = losses.VAT(eps=0.01, xi=1e-3, steps=60).adversaries(model, x, y, drawn(device, 0))
    direction = (found - x).flatten()
    p, w = model(x).softmax(1)[0], model[1].weight
    fisher = w.T @ (p.diag() - p.outer(p)) @ w
    leading = torch.linalg.eigh(fisher).eigenvectors[:, -1]
    assert abs(F.cosine_similarity(direction, leading, dim=0)) > 0.999
    torch.testing.assert_close(direction.norm(), torch.tensor(0.01, device=device, dtype=torch.float64))


def test_local_linearity_of_a_linear_loss_is_the_steepness_alone(device):
    model, (x, y) = network(device), batch(device)
    loss = losses.LocalLinearity(eps=1e-6)
    gap = losses.LocalLinearity(ratio=0.0, eps=1e-6)
    draw = Draw()
    found = loss.adversaries(model, x, y, draw)
    assert gap.terms(model, x, found, y, draw).smoothness < 1e-4 * loss.terms(model, x, found, y, draw).smoothness


def test_curvature_of_a_quadratic(device):
    """For loss-like logits the change of the gradient is H z; unsquared, its length."""
    model, (x, y) = network(device), batch(device)
    squared, norm = (losses.CURE(1.0, EPS, squared=s)(model, x[:1], y[:1]).smoothness for s in (True, False))
    torch.testing.assert_close(norm**2, squared)


@pytest.mark.parametrize(("p", "squared"), [(1.0, False), (2.0, False), (2.0, True), (3.0, False), (math.inf, False)])
def test_finite_differences_converge_to_the_exact_penalty(p, squared, device):
    """At rate h, in the value and in the parameter gradient; per-channel eps included."""
    # Squares of what BatchNorm mixes are not mixed alike.
    model, (x, y) = network(device, batch_norm=not squared), batch(device)
    eps = torch.tensor([0.1, 0.2, 0.4], device=device, dtype=x.dtype)
    penalty = losses.GradientPenalty(WEIGHT, p, eps, squared=squared, label_smoothing=0.1)
    before = snapshot(model)
    errors = penalty.finite_difference_error(model, x, y, (0.1, 0.01, 0.001))
    assert_unchanged(model, before)
    assert all(q.grad is None for q in model.parameters())
    for previous, error in itertools.pairwise(errors):
        assert error.exact == previous.exact > 0
        for name in ("value_error", "gradient_error"):
            ratio = getattr(previous, name) / getattr(error, name)
            assert 5 < ratio < 20, (name, ratio)


def test_finite_differences_at_a_zero_gradient(device):
    constant, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).to(device, torch.float64), batch(device)
    nn.init.zeros_(constant[1].weight)
    for p in (1.0, 2.0, 3.0, math.inf):
        terms = losses.GradientPenalty(p=p, estimator="finite-difference")(constant, x, y)
        assert terms.smoothness == 0
        assert all(g.isfinite().all() for g in gradients(terms.total, constant))


def test_every_loss_has_a_case():
    named = {type(case.make()).__name__ for case in over_losses.args[1]} | {"AWP", "CrossEntropy", "Lazy"}
    named |= {"JacobianPenalty", "FisherPenalty", "CrossLipschitz"}  # tests of their own
    without = sorted(set(losses.__all__) - named)
    assert not without, f"add cases of {without} to ATTACKED or PLAIN of tests/method_losses.py"
    assert named <= set(losses.__all__), f"{sorted(named - set(losses.__all__))} is not in losses.__all__"
    assert PLAIN
