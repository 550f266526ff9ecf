"""Random projections: unbiased, with the variance that each law promises, and a variance estimate that is unbiased too.

Every sample of a large batch is the same point, so that each draws its projections for the same known Jacobian.  Bounds
are in standard errors, measured from the draws themselves; |z| <= 4.5 fails by chance once in 150 000, and the seeds
are fixed.
"""

import math

import pytest
import torch
from torch import nn

from jacobian_cases import KINDS, LAWS, assert_equal_but_for_rounding, over_kinds, over_laws
from robustkern import input_jacobian, jacobian_norm, reference, suggest_projections

CLASSES, SAMPLES, BOUND = 5, 20000, 4.5

pytestmark = [pytest.mark.montecarlo, pytest.mark.usefixtures("not_emulated")]


def network(device):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(device, torch.float64)


def point(device):
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.to(device).requires_grad_()


def matrix(model, x, kind):
    """A = M J J^T M^T at the point, w = M v being the cotangents of the kind."""
    outputs = model(x)
    jacobian = input_jacobian(outputs, x)[0]
    p = outputs.softmax(1)[0]
    identity = torch.eye(CLASSES, device=x.device, dtype=x.dtype)
    m = {
        "plain": identity,
        "centred": identity - 1 / CLASSES,
        "fisher": p.sqrt().diag() - torch.outer(p, p.sqrt()),
    }[kind]
    root = m.T @ jacobian
    return root @ root.T


def predicted_variance(a, law, projections):
    """The variance of one sample's estimate."""
    d, trace, squares = len(a), a.trace(), a.square().sum()
    one = {
        "gaussian": 2 * squares,
        "rademacher": 2 * (squares - a.diagonal().square().sum()),
    }.get(law, 2 * d / (d + 2) * (squares - trace**2 / d))
    return one / projections * ((d - projections) / (d - 1) if law == "orthonormal" else 1.0)


def estimates(device, law, kind, projections):
    model, x = network(device), point(device)
    a = matrix(model, x, kind).detach()
    many = x.detach().repeat(SAMPLES, 1).requires_grad_()
    options = {"law": law, "kind": kind, "create_graph": False, "generator": torch.Generator(device).manual_seed(11)}
    if projections == 1:
        return a, jacobian_norm(model(many), many, **options), None
    return a, *jacobian_norm(model(many), many, projections, **options, return_variance=True)


@over_kinds
@over_laws
@pytest.mark.parametrize("projections", [1, 3, 5])
def test_mean_and_variance(law, kind, projections, device):
    a, values, variances = estimates(device, law, kind, projections)
    trace, variance = a.trace(), predicted_variance(a, law, projections)
    if law == "orthonormal" and projections == CLASSES:
        assert_equal_but_for_rounding(values, trace.expand_as(values))
        assert not variances.any()
        return
    deviations = values - trace
    assert abs(deviations.mean()) <= BOUND * (variance / SAMPLES) ** 0.5
    squares = deviations.square()
    assert abs(squares.mean() - variance) <= BOUND * squares.std() / SAMPLES**0.5
    if variances is not None:
        assert abs(variances.mean() - variance) <= BOUND * variances.std() / SAMPLES**0.5


def test_the_laws_differ_by_more_than_the_bounds():
    """Each law's figure would fail the test of any other law."""
    a, values, _ = estimates("cpu", "orthonormal", "plain", 3)
    squares = (values - a.trace()).square()
    for law in ("sphere", "gaussian", "rademacher"):
        assert abs(squares.mean() - predicted_variance(a, law, 3)) > 3 * BOUND * squares.std() / SAMPLES**0.5


@over_kinds
@pytest.mark.parametrize("law", ["orthonormal", "gaussian"])
def test_gradients_are_unbiased(law, kind, device):
    """Tested on 100 means of 200 samples each."""
    model, x = network(device), point(device)
    exact = jacobian_norm(model(x), x, "exact", kind=kind)
    parameters = list(model.parameters())[:3]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact.sum(), parameters)])
    generator = torch.Generator(device).manual_seed(12)
    rows = []
    for _ in range(100):
        many = x.detach().repeat(200, 1).requires_grad_()
        norm = jacobian_norm(model(many), many, 3, law=law, kind=kind, reduction="mean", generator=generator)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(norm, parameters)]))
    gradients = torch.stack(rows)
    z = (gradients.mean(0) - expected) / (gradients.std(0) / 10)
    assert expected.all()
    assert z.abs().max() <= BOUND  # the largest of 96


def test_suggested_projections_reach_the_error(device):
    model, x = network(device), point(device)
    a = matrix(model, x, "plain").detach()
    many = x.detach().repeat(500, 1).requires_grad_()
    outputs = model(many)
    for law in LAWS:
        generator = torch.Generator(device).manual_seed(13)
        measured = jacobian_norm(
            outputs, many, 3, law=law, return_variance=True, create_graph=False, generator=generator
        )
        for error in (1.0, 0.3, 0.1, 1e-4):
            suggested = suggest_projections(*measured, error, projections=3, dimensions=CLASSES, law=law)
            allowed = (error * a.trace()) ** 2
            if law == "orthonormal":
                needed = next(k for k in range(1, CLASSES + 1) if predicted_variance(a, law, k) <= allowed)
            else:
                needed = math.ceil(predicted_variance(a, law, 1) / allowed)
            assert suggested == pytest.approx(needed, rel=0.15, abs=1)
    constant = torch.ones(4)
    assert suggest_projections(constant, torch.zeros(4), 0.1, projections=2, dimensions=9) == 1


# ------------------------------------------------------------------ what the published formulas got wrong


def seed_fim_penalty(model, x, class_only=True):
    """1/2 C/(n B) sum ||J^T (v / p)||^2 with v = e_0: the penalty that is called the Fisher information elsewhere."""
    outputs = model(x)
    p = outputs.softmax(1)
    v = torch.zeros_like(p)
    v[:, 0] = 1
    (grad,) = torch.autograd.grad(outputs, x, v / p, create_graph=True)
    return 0.5 * CLASSES / len(x) * grad.square().sum()


def test_the_fisher_trace_is_not_weighted_by_one_over_p(device):
    """1/p belongs to the gradients of p, not of the logits: ours is the definition, the other is 1/p^2 too large."""
    model, x = network(device), point(device)
    outputs = model(x)
    log_p = outputs.log_softmax(1)
    scores = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in log_p[0]]
    definition = sum(p * s.square().sum() for p, s in zip(log_p[0].exp(), scores))  # sum_c p_c ||grad log p_c||^2
    torch.testing.assert_close(jacobian_norm(outputs, x, "exact", kind="fisher")[0], definition)
    assert seed_fim_penalty(model, x) > 10 * 0.5 * definition


def test_a_confident_sample_neither_explodes_nor_disappears(device):
    """Where p_0 underflows, 1/p_0 is infinite; the Fisher information and its gradient are finite."""
    model, x = network(device).float(), point(device).float().detach().requires_grad_()
    with torch.no_grad():
        model[2].bias[0] -= 120
    assert not seed_fim_penalty(model, x).isfinite()
    norm = jacobian_norm(model(x), x, "exact", kind="fisher").sum()
    norm.backward()
    assert norm > 0 and norm.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_class_counts(device):
    """A network that depends on x through class 3 alone: a projection on class 0 sees nothing."""
    model, x = network(device), point(device)
    with torch.no_grad():
        model[2].weight[torch.arange(CLASSES) != 3] = 0
    assert seed_fim_penalty(model, x) == 0
    for projections in (1, "exact"):
        for kind in KINDS:
            assert jacobian_norm(model(x), x, projections, kind=kind) > 0


def test_the_mean_does_not_depend_on_the_batch_size(device):
    """The gradient of a batch's mean loss shrinks with the batch; these are per-sample norms."""
    model, x = network(device), point(device)
    for size in (1, 4, 64):
        many = x.detach().repeat(size, 1).requires_grad_()
        outputs = model(many)
        norm = jacobian_norm(outputs, many, "exact", reduction="mean")
        torch.testing.assert_close(norm, matrix(model, x, "plain").trace())
        (coupled,) = torch.autograd.grad(outputs.mean(0)[0], many)
        (alone,) = torch.autograd.grad(model(x)[0, 0], x)
        torch.testing.assert_close(size * coupled[:1], alone)  # a weight would have to make up for this factor


def test_reference_and_op_draw_the_same(device):
    """So what these tests measure holds for every implementation."""
    model, x = network(device), point(device)
    outputs = model(x)
    for law in LAWS:
        norms = [
            jacobian_norm(outputs, x, 2, law=law, generator=torch.Generator(device).manual_seed(0), impl=impl)
            for impl in ("auto", "reference")
        ]
        torch.testing.assert_close(*norms)
    assert reference.random_cotangents(outputs, 2).shape == (2, 1, CLASSES)
