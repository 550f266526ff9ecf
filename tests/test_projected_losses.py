"""Penalties on a Jacobian as losses: values, conventions, steps and samples left out with nothing lost on average."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jacobian_cases import assert_equal_but_for_rounding, network, norm_in_plain_pytorch, parameter_gradients
from robustkern import Draw, models
from robustkern.losses import CrossLipschitz, FisherPenalty, JacobianPenalty, Lazy
from robustkern.sharding import Shard
from robustkern.testing import assert_as_accurate_as_reference

KINDS = {JacobianPenalty: "plain", FisherPenalty: "fisher", CrossLipschitz: "centred"}
over_penalties = pytest.mark.parametrize("penalty", list(KINDS), ids=lambda p: p.__name__)
WEIGHT, EPS, CLASSES = 0.7, 3.0, 4


def batch(device, dtype=torch.float64, count=6):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(count, 3, 5, 5, generator=generator, dtype=torch.float64).to(device, dtype)
    return x, torch.randint(CLASSES, (count,), generator=generator).to(device)


def smoothness_in_plain_pytorch(penalty, model, x, eps=EPS):
    """The smoothness by each method's definition; the cross-Lipschitz one is the sum over pairs."""
    x = x.detach().requires_grad_()
    outputs = model(x)
    if penalty is not CrossLipschitz:
        return eps**2 * norm_in_plain_pytorch(outputs.unsqueeze(2), x, KINDS[penalty]).mean()
    rows = [torch.autograd.grad(column.sum(), x, create_graph=True)[0].flatten(1) for column in outputs.unbind(1)]
    pairs = sum((a - b).square().sum() for a in rows for b in rows)
    return eps**2 * pairs / (len(x) * CLASSES**2)


@over_penalties
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("projections", ["exact", CLASSES])
def test_terms_and_parameter_gradients(penalty, impl, projections, device):
    model, (x, y) = network(device), batch(device)
    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
    smoothness = smoothness_in_plain_pytorch(penalty, model, x)
    terms = penalty(WEIGHT, projections, EPS, label_smoothing=0.1, impl=impl)(model, x, y)
    assert terms.weight == WEIGHT
    assert_equal_but_for_rounding(terms.orientation, loss)
    assert_equal_but_for_rounding(terms.smoothness, smoothness)
    share = parameter_gradients(terms.smoothness, model)
    expected = parameter_gradients(loss + WEIGHT * smoothness, model)
    terms.backward(inputs=model.parameters())
    for parameter, e, s in zip(model.parameters(), expected, share, strict=True):
        assert_equal_but_for_rounding(parameter.grad, e, 1000)
        assert s.any() or (penalty is not FisherPenalty and parameter is model[3].bias)
    assert x.grad is None and not x.requires_grad


@over_penalties
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_plain_pytorch(penalty, dtype, device):
    def gradient(model, terms):
        return torch.cat([g.flatten() for g in parameter_gradients(terms, model)])

    model, (x, y) = network(device, dtype), batch(device, dtype)
    actual = gradient(model, penalty(WEIGHT, "exact", EPS)(model, x, y).total)
    eager = F.cross_entropy(model(x), y) + WEIGHT * smoothness_in_plain_pytorch(penalty, model, x)
    eager = gradient(model, eager)
    model, x = model.double(), x.double()
    exact = gradient(model, F.cross_entropy(model(x), y) + WEIGHT * smoothness_in_plain_pytorch(penalty, model, x))
    assert_as_accurate_as_reference(actual, eager, exact)


@over_penalties
def test_the_weight_means_the_same_for_every_batch_size(penalty, device):
    model, (x, y) = network(device), batch(device)
    loss = penalty(WEIGHT, "exact", EPS)
    once, thrice = loss(model, x, y), loss(model, x.repeat(3, 1, 1, 1), y.repeat(3))
    torch.testing.assert_close(thrice.smoothness, once.smoothness)
    for a, e in zip(parameter_gradients(thrice.total, model), parameter_gradients(once.total, model), strict=True):
        torch.testing.assert_close(a, e)


def test_published_conventions(device):
    """Other codes' conventions, and the weights that they correspond to here."""
    model, (x, y) = network(device), batch(device)
    leaf = x.clone().requires_grad_()
    frobenius = norm_in_plain_pytorch(model(leaf).unsqueeze(2), leaf, "plain")
    hoffman = JacobianPenalty(projections="exact")(model, x, y)
    torch.testing.assert_close(hoffman.weight * hoffman.smoothness, 0.01 / 2 * frobenius.mean())
    norm = JacobianPenalty(0.1, "exact", squared=False)(model, x, y)
    torch.testing.assert_close(norm.weight * norm.smoothness, 0.1 * frobenius.sqrt().mean())
    fisher = FisherPenalty(projections="exact")(model, x, y)
    trace = norm_in_plain_pytorch(model(leaf).unsqueeze(2), leaf, "fisher").mean()
    torch.testing.assert_close(fisher.weight * fisher.smoothness, (8 / 255) ** 2 * trace / 2)


def test_fisher_predicts_the_divergence_under_small_random_perturbations(device):
    model, (x, y) = network(device), batch(device)
    eps = 1e-4
    fisher = FisherPenalty(0.5, "exact", eps)(model, x, y)
    log_p = model(x).log_softmax(1)
    signs = torch.randint(2, (2000, 75), generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    divergences = []
    for sign in signs:
        moved = model(x + eps * sign.view(3, 5, 5)).log_softmax(1)
        divergences.append((log_p.exp() * (log_p - moved)).sum(1).mean().detach())
    divergences = torch.stack(divergences)
    z = (divergences.mean() - fisher.weight * fisher.smoothness) / (divergences.std() / len(signs) ** 0.5)
    assert z.abs() < 4.5
    assert divergences.mean() > 10 * divergences.std() / len(signs) ** 0.5


@over_penalties
def test_every(penalty, device):
    """The penalty acts on one step of three, with three times the weight; the other steps are plain ones."""
    model, (x, y) = network(device), batch(device)
    always = penalty(WEIGHT, "exact", EPS)
    lazy = Lazy(always, 3)
    terms = [lazy(model, x, y, Draw(step=step)) for step in range(7)]
    expected = always(model, x, y)
    assert [t.weight for t in terms] == [3 * WEIGHT, 0, 0] * 2 + [3 * WEIGHT]
    for t in terms:
        torch.testing.assert_close(t.orientation, expected.orientation)
        torch.testing.assert_close(t.smoothness, expected.smoothness if t.weight else torch.zeros_like(t.smoothness))


@over_penalties
def test_a_fraction_is_unbiased(penalty, device):
    """The mean over all draws is unbiased; each draw has the cross-entropy of every sample."""
    model, (x, y) = network(device), batch(device)
    expected = penalty(WEIGHT, "exact", EPS)(model, x, y)
    loss, draw = penalty(WEIGHT, "exact", EPS, fraction=0.5), Draw(torch.Generator(device).manual_seed(0))
    draws = [loss(model, x, y, draw) for _ in range(200)]
    assert all(terms.weight == WEIGHT for terms in draws)
    for terms in draws[:5]:
        torch.testing.assert_close(terms.orientation, expected.orientation)
        orientation = parameter_gradients(terms.orientation, model)
        for a, e in zip(orientation, parameter_gradients(expected.orientation, model), strict=True):
            torch.testing.assert_close(a, e)
    smoothness = torch.stack([terms.smoothness.detach() for terms in draws])
    assert abs(smoothness.mean() - expected.smoothness) < 4.5 * smoothness.std() / 200**0.5
    assert smoothness.unique().numel() > 10  # of the 20 halves


@over_penalties
def test_a_fraction_differentiates_twice_only_its_part(penalty, device):
    model, (x, y) = network(device), batch(device)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append((len(inputs[0]), inputs[0].requires_grad)))
    penalty(WEIGHT, fraction=0.34)(model, x, y).backward(inputs=model.parameters())
    assert sizes == [(2, True), (4, False)]
    sizes.clear()
    penalty(WEIGHT, fraction=0.01)(model, x, y)
    penalty(WEIGHT, fraction=0.99)(model, x, y)
    assert sizes == [(1, True), (5, False), (6, True)]


def test_batch_norm_sees_the_whole_batch(device):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES)]
    model, (x, y) = nn.Sequential(*layers).to(device, torch.float64), batch(device)
    whole = JacobianPenalty(projections="exact")(model, x, y)
    running = model[1].running_mean.clone()
    model[1].reset_running_stats()
    half = JacobianPenalty(projections="exact", fraction=0.5)(model, x, y)
    torch.testing.assert_close(half.orientation, whole.orientation)
    torch.testing.assert_close(model[1].running_mean, running)
    assert model[1].num_batches_tracked == 1
    assert 0 < half.smoothness != whole.smoothness
    halves = JacobianPenalty(projections="exact", fraction=0.5)
    draw = Draw(torch.Generator(device).manual_seed(0))
    draws = torch.stack([halves(model, x, y, draw).smoothness.detach() for _ in range(200)])
    assert abs(draws.mean() - whole.smoothness) < 4.5 * draws.std() / 200**0.5
    assert draws.unique().numel() > 10


def test_models_that_need_the_batch_whole_without_saying_so(device):
    """A function hides what it calls; InstanceNorm may keep statistics."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES)]
    model, (x, y) = nn.Sequential(*layers).to(device, torch.float64), batch(device)
    whole = F.cross_entropy(model(x), y)
    model[1].reset_running_stats()
    terms = JacobianPenalty(fraction=0.5)(lambda x: model(x), x, y)
    torch.testing.assert_close(terms.orientation, whole)
    assert model[1].num_batches_tracked == 1

    model[1] = nn.InstanceNorm2d(4, track_running_stats=True).to(device, torch.float64)
    model(x)
    once = model[1].running_mean.clone()
    model[1].reset_running_stats()
    JacobianPenalty(fraction=0.5)(model, x, y)
    torch.testing.assert_close(model[1].running_mean, once)


@over_penalties
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_parts_of_a_batch_have_the_projections_of_their_rows(penalty, fraction, device):
    """Two processes with a part each: the same projections, and the same samples, as one with the whole batch."""
    model, (x, y) = network(device), batch(device)

    def smoothness(shard, rows):
        draw = Draw(torch.Generator(device).manual_seed(5), shard=shard)
        return penalty(WEIGHT, 2, EPS, fraction=fraction)(model, x[rows], y[rows], draw)

    whole = smoothness(None, slice(None)).smoothness
    parts = [(Shard(0, 2, 6), slice(0, 2)), (Shard(2, 4, 6), slice(2, 6))]
    summed = sum(shard.share * smoothness(shard, rows).smoothness for shard, rows in parts)
    torch.testing.assert_close(summed, whole)
    assert whole > 0


@over_penalties
def test_the_generator_decides(penalty, device):
    model, (x, y) = network(device), batch(device)

    def run(seed):
        loss, draw = penalty(WEIGHT, fraction=0.5), Draw(torch.Generator(device).manual_seed(seed))
        return torch.stack([loss(model, x, y, draw).smoothness.detach() for _ in range(3)])

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


@over_penalties
def test_options_are_checked(penalty, device):
    for options, message in (
        ({"fraction": 0}, r"fraction must be a number in \(0, 1\], got 0"),
        ({"fraction": "a"}, r"fraction must be a number in \(0, 1\], got 'a'"),
        ({"projections": 0}, "projections must be an integer of at least 1 or .exact., got 0"),
        ({"law": "uniform"}, "law must be one of"),
        ({"impl": "other"}, "impl must be one of"),
        ({"weight": "a"}, r"weight must be a number in \[0, inf\), got 'a'"),
        ({"eps": "a"}, "eps must be finite and not negative.* got 'a'"),
    ):
        with pytest.raises(ValueError, match=f"{penalty.__name__}: {message}"):
            penalty(**options)
    with pytest.raises(TypeError, match=rf"{penalty.__name__}: x must be a floating-point tensor, got torch\.uint8"):
        penalty()(network(device), batch(device)[0].to(torch.uint8), batch(device)[1])
    with pytest.raises(TypeError, match=f"{penalty.__name__}: x must be a tensor, got NoneType"):
        penalty()(network(device), None, batch(device)[1])
    x, y = batch(device)
    for fraction, targets in ((1.0, y[:3]), (0.5, y[:3]), (0.5, y.repeat(2))):
        with pytest.raises(ValueError, match=f"{penalty.__name__}: y must have shape .6., got .{len(targets)}."):
            penalty(fraction=fraction)(network(device), x, targets)


@over_penalties
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_empty_batch_has_no_mean(penalty, fraction, device):
    terms = penalty(fraction=fraction)(network(device), *(t[:0] for t in batch(device)))
    assert terms.orientation.isnan() and terms.smoothness.isnan()


@over_penalties
def test_a_compiled_step(penalty, device):
    model, (x, y) = network(device, torch.float32), batch(device, torch.float32)
    x.requires_grad_()
    loss = penalty(WEIGHT, 2, EPS, impl="reference")

    def step(x, y):
        return torch.autograd.grad(loss(model, x, y).total, tuple(model.parameters()), allow_unused=True)

    torch.manual_seed(3)
    eager = step(x, y)
    torch.manual_seed(3)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, backend="eager", fullgraph=True)(x, y)
    for a, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, e)


@over_penalties
def test_it_trains(penalty, device):
    torch.manual_seed(0)
    model = models.SmallCNN(CLASSES, (3, 5, 5), width=4, features=8).to(device)
    x, y = batch(device, torch.float32)
    loss, draw = penalty(0.3, eps=0.5), Draw(torch.Generator(device).manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    totals = []
    for _ in range(30):
        optimizer.zero_grad()
        terms = loss(model, x, y, draw)
        terms.backward(inputs=model.parameters())
        optimizer.step()
        totals.append(terms.total.item())
    assert sum(totals[-5:]) < sum(totals[:5])
