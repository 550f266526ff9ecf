"""kl_divergence: both logits in both orders, classes without probability, predictions that nearly agree."""

import math

import pytest
import torch
import torch.nn.functional as F

from cases import over_dtypes, random_like
from robustkern import reference
from robustkern.ops import kl_divergence
from robustkern.testing import assert_as_accurate_as_reference, cast

over_impls = pytest.mark.parametrize("impl", ["kernel", "reference"])


def logits(device, *shape, dtype=torch.float64, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


@over_impls
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck_in_both_logits(impl, temperature, device):
    p, q = logits(device, 3, 5).requires_grad_(), logits(device, 3, 5, seed=1).requires_grad_()

    def function(p, q):
        return kl_divergence(p, q, temperature=temperature, impl=impl)

    assert torch.autograd.gradcheck(function, (p, q))
    assert torch.autograd.gradgradcheck(function, (p, q))


@over_impls
def test_the_values_of_pytorch(impl, device):
    p, q = logits(device, 4, 7, 3), logits(device, 4, 7, 3, seed=1)
    expected = F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(kl_divergence(p, q, impl=impl), expected)


def derivatives_in_both(impl, p, q, grad, u, v):
    p, q, grad = (t.detach().requires_grad_() for t in (p, q, grad))
    value = kl_divergence(p, q, impl=impl)
    grads = torch.autograd.grad(value, (p, q), grad, create_graph=True)
    second = torch.autograd.grad(grads, (grad, p, q), (u, v))
    return [t.detach() for t in (value, *grads, *second)]


@over_dtypes
@pytest.mark.parametrize("rows_and_classes", [(9, 10), (70, 3), (37, 128), (9, 129), (9, 2500)])
def test_both_gradients_and_both_second_derivatives_together(dtype, rows_and_classes, device):
    p, q = (logits(device, *rows_and_classes, dtype=dtype, seed=seed) for seed in (0, 1))
    grad = random_like(kl_divergence(p, q, impl="reference"), 2)
    inputs = p, q, grad, random_like(p, 3), random_like(p, 4)
    actual = derivatives_in_both("kernel", *inputs)
    exact = derivatives_in_both("reference", *cast(inputs))
    eager = derivatives_in_both("reference", *(cast(inputs, torch.float32) if dtype == torch.float64 else inputs))
    for trio in zip(actual, eager, exact, strict=True):
        assert_as_accurate_as_reference(*trio)


@over_impls
@pytest.mark.parametrize("constant", ["p", "q"])
def test_a_target_is_not_differentiated(impl, constant, device):
    p, q = logits(device, 3, 5), logits(device, 3, 5, seed=1)
    leaves = [t.clone().requires_grad_() for t in (p, q)]
    expected = torch.autograd.grad(kl_divergence(*leaves, impl=impl).sum(), leaves)
    moving = leaves[constant == "p"]
    pair = (p, moving) if constant == "p" else (moving, q)
    (grad,) = torch.autograd.grad(kl_divergence(*pair, impl=impl).sum(), moving, create_graph=True)
    torch.testing.assert_close(grad, expected[constant == "p"])
    (second,) = torch.autograd.grad(grad.square().sum(), moving)
    assert second.any()


@pytest.mark.parametrize("classes", [10, 200])
def test_what_is_not_asked_for_changes_nothing_else(classes, device):
    """An absent cotangent gives the same as one of zeros, too."""
    p, q = logits(device, 37, classes), logits(device, 37, classes, seed=1)
    u = logits(device, 37, classes, seed=2)
    ops, grad = torch.ops.robustkern, torch.ones(37, device=device, dtype=p.dtype)
    saved = grad, p, q, ops.kl_divergence(p, q, 1.0)[1], 1.0
    both = ops.kl_divergence_backward(*saved, True, True)
    torch.testing.assert_close(ops.kl_divergence_backward(*saved, True, False)[0], both[0])
    torch.testing.assert_close(ops.kl_divergence_backward(*saved, False, True)[1], both[1])
    for cotangents in ((u, None), (None, u)):
        zeros = [torch.zeros_like(p) if t is None else t for t in cotangents]
        both = ops.kl_divergence_double_backward(*zeros, *saved, True, True)
        only_p = ops.kl_divergence_double_backward(*cotangents, *saved, True, False)
        only_q = ops.kl_divergence_double_backward(*cotangents, *saved, False, True)
        torch.testing.assert_close(only_p[:2], both[:2])
        torch.testing.assert_close(only_q[::2], both[::2])


@over_dtypes
@pytest.mark.parametrize("classes", [3, 10, 100])
def test_a_row_gives_the_same_wherever_it_stands(dtype, classes, device):
    """With few classes, many rows are processed at a time."""
    p, q = (3.0 * logits(device, 70, classes, seed=seed) for seed in (0, 1))
    inputs = [t.to(dtype) for t in (p, q, logits(device, 70, classes, seed=2), logits(device, 70, classes, seed=3))]
    grad = random_like(kl_divergence(*inputs[:2], impl="reference"), 4)

    def results(rows):
        p, q, u, v = (t[rows] for t in inputs)
        return derivatives_in_both("kernel", p, q, grad[rows], u, v)

    whole = results(slice(None))
    for rows in (slice(0, 1), slice(1, 3), slice(30, 70), slice(5, 69)):
        for part, expected in zip(results(rows), whole, strict=True):
            assert torch.equal(part, expected[rows])


@over_impls
@pytest.mark.parametrize("low", [-math.inf, -1e4])
def test_classes_without_probability_count_for_nothing(impl, low, device):
    """Neither in the value nor in any derivative, whatever the other prediction gives them."""
    p, q = logits(device, 4, 6), logits(device, 4, 6, seed=1)
    p[:, 1] = p[2:, 4] = low
    q[:2, 1] = low
    inputs = p, q, torch.ones(4, device=device, dtype=p.dtype), random_like(p, 2), random_like(p, 3)
    value, grad_p, grad_q, gg_grad, second_p, second_q = derivatives_in_both(impl, *inputs)
    for t in (value, grad_p, grad_q, gg_grad, second_p, second_q):
        assert t.isfinite().all()
    kept = [0, 2, 3, 4, 5]
    fewer = derivatives_in_both(impl, *(t[:2, kept] if t.dim() == 2 else t[:2] for t in inputs))
    for a, e in zip((value, grad_p, grad_q, gg_grad, second_p, second_q), fewer, strict=True):
        torch.testing.assert_close(a[:2, kept] if a.dim() == 2 else a[:2], e)
    for t in (grad_p, second_p):
        assert not t[:, 1].any() and not t[2:, 4].any()
    assert not grad_q[:2, 1].any() and (grad_q[2:, 1] > 0).all()


@over_impls
def test_one_hot_targets_give_the_cross_entropy(impl, device):
    """With zeros for which torch.nn.functional.kl_div, given probabilities and their logarithm, returns NaN."""
    q, y = logits(device, 4, 6).requires_grad_(), torch.tensor([0, 3, 5, 2], device=device)
    p = torch.full_like(q, -math.inf, requires_grad=False).scatter(1, y[:, None], 0.0)
    value = kl_divergence(p, q, impl=impl)
    torch.testing.assert_close(value, F.cross_entropy(q, y, reduction="none"))
    (grad,) = torch.autograd.grad(value.sum(), q)
    torch.testing.assert_close(grad, q.softmax(1) - F.one_hot(y, 6))
    zero = torch.tensor([[0.0, 1.0]], device=device)
    assert (zero * (zero.log() - torch.tensor([[0.5, 0.5]], device=device).log())).sum().isnan()


@over_impls
def test_what_one_excludes_and_the_other_expects_is_infinitely_far(impl, device):
    p, q = logits(device, 3, 4), logits(device, 3, 4, seed=1)
    q[1, 2] = -math.inf
    value = kl_divergence(p, q, impl=impl)
    assert value[1] == math.inf and value[[0, 2]].isfinite().all()


@over_dtypes
def test_equal_predictions_are_at_distance_zero(dtype, device):
    p = (5.0 * logits(device, 6, 33)).to(dtype).requires_grad_()
    q = p.detach().clone().requires_grad_()
    value = kl_divergence(p, q, impl="kernel")
    assert not value.any()
    for grad in torch.autograd.grad(value.sum(), (p, q)):
        assert not grad.any()


def test_predictions_that_nearly_agree_keep_their_digits(device):
    """Even where the sum of p log(p / q) in the same precision has no digits left, and is not even positive."""
    p = logits(device, 64, 10, dtype=torch.float32)
    q = p + 1e-4 * logits(device, 64, 10, dtype=torch.float32, seed=1)
    exact = reference.kl_divergence(p.double(), q.double())
    error = (kl_divergence(p, q, impl="kernel") / exact - 1).abs().max()
    plain = (reference.kl_divergence(p, q) / exact - 1).abs().max()
    assert error < 0.01 < 1 < plain
    assert (kl_divergence(p, q, impl="kernel") > 0).all()


def test_a_shift_of_the_logits_changes_nothing(device):
    p, q = logits(device, 5, 8, dtype=torch.float32), logits(device, 5, 8, dtype=torch.float32, seed=1)
    p, q = p.mul(1024).round() / 1024, q.mul(1024).round() / 1024  # exact when shifted
    moved = kl_divergence(p + 512.0, q - 256.0, impl="kernel")
    assert torch.equal(moved, kl_divergence(p, q, impl="kernel"))


def test_nan_stays_in_its_row(device):
    p, q = logits(device, 4, 6), logits(device, 4, 6, seed=1)
    p[1, 3], q[2, 0] = math.nan, math.nan
    leaves = p.requires_grad_(), q.requires_grad_()
    value = kl_divergence(*leaves, impl="kernel")
    grads = torch.autograd.grad(value.sum(), leaves)
    for t in (value, *grads):
        assert t[[0, 3]].isfinite().all() and t[1].isnan().any() and t[2].isnan().any()


@pytest.mark.parametrize(
    ("p", "q", "options", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), {}, ValueError, r"q_logits must be \[3, 4\] on cpu .* got \[3, 5\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4).double(), {}, TypeError, "q_logits must be torch.float32 like p_logits"),
        (torch.zeros(3), torch.zeros(3), {}, ValueError, r"p_logits must be \[B, C\]"),
        (torch.zeros(3, 4).long(), torch.zeros(3, 4), {}, TypeError, "p_logits must be float32"),
        (torch.zeros(3, 4), [0.0], {}, TypeError, "q_logits must be a tensor, got list"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"temperature": 0.0}, ValueError, "temperature must be positive"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"impl": "fast"}, ValueError, "impl must be"),
    ],
)
def test_misuse(p, q, options, error, message):
    with pytest.raises(error, match=f"kl_divergence: {message}"):
        kl_divergence(p, q, **options)
