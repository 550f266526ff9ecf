"""Numbers at the edge: zeros, tiny, huge, infinite and missing ones, long rows, and rows that must stay apart."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import robustkern
from cases import (
    CASES,
    assert_accurate,
    assert_same_bits,
    cotangents,
    over_chains,
    over_dtypes,
    over_filled,
    over_small_chains,
    random_like,
    run,
)
from robustkern import reference
from robustkern.ops import row_norm, softmax_cross_entropy
from robustkern.testing import assert_as_accurate_as_reference
from tests.samples import Sample

NORMS = [{"p": 1.0}, {"p": 2.0}, {"p": 2.0, "squared": True}, {"p": math.inf}, {"p": 3.0}, {"p": 1.5}, {"p": 4.0}]
over_norms = pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(map(str, o.values())))


def is_flat(options):
    return options["p"] in (1.0, math.inf)


def norm_sample(x, options):
    return Sample(row_norm, (x,), options, str(options), zero=("second",) if is_flat(options) else ())


# ------------------------------------------------------------------ every operator


@over_chains
def test_a_bad_row_stays_visible_and_alone(case, device):
    sample = case.sample(device, torch.float32)
    x = sample.inputs[0]
    if x.shape[0] < 2:
        return
    grad, u = cotangents(sample)
    clean = run(sample, grad, u)
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = x.clone()
        poisoned[(1, *(0,) * (x.dim() - 1))] = bad
        result = run(sample, grad, u, x=poisoned)
        for name, actual, expected in zip(result._fields, result, clean, strict=True):
            others = [i for i in range(x.shape[0]) if i != 1]
            assert_same_bits(actual[others], expected[others])
            assert name != "value" or bad == -math.inf or not actual[1].isfinite().all()


@over_dtypes
@over_filled
def test_all_zeros_have_finite_derivatives(case, dtype, device):
    sample = case.sample(device, dtype)
    zeros = dataclasses.replace(sample, inputs=(torch.zeros_like(sample.inputs[0]), *sample.inputs[1:]))
    for sign in (1.0, -1.0):
        result = run(zeros, *cotangents(sample), x=sign * zeros.inputs[0])
        assert all(derivative.isfinite().all() for derivative in result)


@pytest.mark.parametrize("case", [c for c in CASES if c.empty], ids=str)
@over_dtypes
def test_empty_batches_and_rows(case, dtype, device):
    sample = case.sample(device, dtype)
    grad, u = cotangents(sample)
    result, expected = run(sample, grad, u), run(sample, grad, u, "reference")
    for name, actual, like in zip(result._fields, result, expected, strict=True):
        assert actual.shape == like.shape, name
        assert actual.dtype == like.dtype
        assert not actual.any()


@over_small_chains
def test_hessians_are_symmetric(case, device):
    """u . (H v) = v . (H u), through a linear map before the operator."""
    sample = case.sample(device, torch.float64)
    x = sample.inputs[0].detach()
    mix = random_like(x.new_empty(x.numel(), x.numel()), 5) / math.sqrt(x.numel())
    grad, u = cotangents(sample)
    v = random_like(u, 6)

    def hessian_times(direction):
        leaf = x.clone().requires_grad_()
        value = (grad * sample((mix @ leaf.flatten()).view(x.shape), impl="kernel")).sum()
        (grad_x,) = torch.autograd.grad(value, leaf, create_graph=True)
        (product,) = torch.autograd.grad((grad_x * direction).sum(), leaf, allow_unused=True)
        return torch.zeros_like(x) if product is None else product

    uhv, vhu = (u * hessian_times(v)).sum(), (v * hessian_times(u)).sum()
    assert bool(uhv == 0) == ("second" in sample.zero)
    torch.testing.assert_close(uhv, vhu)


@over_small_chains
def test_directional_derivatives_of_a_path(case, device):
    """The change of the value along a path is the integral of the gradient, whatever the formulas say."""
    sample = case.sample(device, torch.float64)
    start, step = sample.inputs[0].detach() + 0.1, 1e-5 * random_like(sample.inputs[0], 8)
    with torch.no_grad():
        change = sample(start + step, impl="kernel") - sample(start - step, impl="kernel")
    nodes, weights = (-math.sqrt(0.6), 0.0, math.sqrt(0.6)), (5 / 9, 8 / 9, 5 / 9)  # Gauss-Legendre on [-1, 1]
    integral = torch.zeros_like(change)
    for node, weight in zip(nodes, weights, strict=True):
        x = (start + node * step).requires_grad_()
        (grad_x,) = torch.autograd.grad(sample(x, impl="kernel").sum(), x)
        per_row = (grad_x * step).flatten(1) if x.dim() > 1 else (grad_x * step)[:, None]
        integral += weight * (per_row.sum(1) if change.dim() == 1 else (grad_x * step).sum(1))
    torch.testing.assert_close(integral, change)


# ------------------------------------------------------------------ row_norm


@over_norms
@over_dtypes
def test_zero_rows_have_the_zero_subgradient_in_every_order(options, dtype, device):
    x = torch.randn(4, 37, dtype=torch.float64).to(device, dtype)
    x[1] = 0.0
    x[3] = -0.0
    sample = norm_sample(x, options)
    grad, u = cotangents(sample)
    result = run(sample, grad, u)
    for row in (1, 3):
        assert not result.value[row].any()
        assert not result.grad_x[row].any()
        if not options.get("squared"):  # the second derivative of the square is 2 everywhere
            assert not result.gg_grad[row].any()
            assert not result.second[row].any()
    assert_accurate(sample, grad, u, result)


@over_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e30])
def test_neither_tiny_nor_huge_rows_lose_digits(options, size, dtype, device):
    if options.get("squared"):
        size = size**0.5
    x = size * torch.randn(3, 50, dtype=torch.float64, device=device)
    sample = norm_sample(x.to(dtype), options)
    grad, u = cotangents(sample)
    assert_accurate(sample, grad, u if size > 1 else size * u)


@over_norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_16_bit_rows_do_not_overflow(options, dtype, device):
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e15
    if options.get("squared") and dtype == torch.float16:
        largest = 1e3
    x = (torch.rand(3, 400, dtype=torch.float64) * largest / 2 + largest / 4).to(device, dtype)
    sample = norm_sample(x, options)
    assert_accurate(sample, *cotangents(sample))


@over_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_law(options, dtype, device):
    """||c x|| = |c| ||x||, and the direction of the gradient does not depend on c: nothing is guarded by an epsilon."""
    x = torch.randn(3, 40, dtype=torch.float64).to(device, dtype)
    exponents = range(-40, 41, 8)  # powers of two, about 1e-12 to 1e12, whose products are exact
    power = 2 if options.get("squared") else 1
    leaf = x.clone().requires_grad_()
    value = row_norm(leaf, **options, impl="kernel")
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    for sign in (1, -1):
        for exponent in exponents:
            scale = 2.0**exponent
            leaf = (sign * scale * x).requires_grad_()
            scaled = row_norm(leaf, **options, impl="kernel")
            (direction,) = torch.autograd.grad(scaled.sum(), leaf)
            eager = value if dtype == torch.float32 else value.float()
            assert_as_accurate_as_reference(scaled.detach() / scale**power, eager, value.double(), what=f"c={scale}")
            exact = sign * gradient.double()
            eager = sign * (gradient if dtype == torch.float32 else gradient.float())
            assert_as_accurate_as_reference(direction / scale ** (power - 1), eager, exact, what=f"c={scale}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@over_norms
def test_subnormal_rows(options, dtype, device):
    """No implementation may flush to zero."""
    if options.get("squared") and dtype != torch.float16:
        return  # its result is zero
    tiny = torch.finfo(dtype).smallest_normal / 8
    x = torch.tensor([[3.0, -2.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64).mul(tiny).to(device, dtype)
    value = row_norm(x, **options, impl="kernel")
    exact = reference.row_norm(x.double() * 2.0**100, **options) * 2.0 ** (-200 if options.get("squared") else -100)
    if dtype == torch.float16:  # its norms are float32
        return assert_as_accurate_as_reference(value, exact.float(), exact)
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormal numbers
    assert ((value.double() - exact).abs() <= 2 * spacing).all()
    assert (value > 0).all()


@over_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_long_rows(options, dtype, device, emulated):
    """A running sum in the storage type would be wrong in its third digit."""
    columns = 3000 if emulated else 300_000
    x = (torch.rand(2, columns, dtype=torch.float64) + 0.5).to(device, dtype)
    sample = norm_sample(x, options)
    grad, u = cotangents(sample)
    assert_accurate(sample, grad, u + 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@over_norms
def test_values_of_bad_rows(options, value, device):
    x = torch.ones(2, 100, device=device)
    x[1, 70] = value
    norm = row_norm(x, **options, impl="kernel")
    assert norm[0].isfinite()
    assert norm[1].isnan() if math.isnan(value) else norm[1] == math.inf
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(row_norm(leaf, **options, impl="kernel").sum(), leaf)
    assert gradient[0].isfinite().all()
    if math.isnan(value):
        assert gradient[1, 70].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ties_of_the_maximum_share_its_gradient(dtype, device):
    x = torch.tensor([[1.0, -2.0, 2.0, 0.5], [3.0, 0.0, 0.0, -1.0]], device=device, dtype=dtype, requires_grad=True)
    row_norm(x, math.inf, impl="kernel").sum().backward()
    assert x.grad.tolist() == [[0.0, -0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_single_zeros_of_the_l1_norm(device):
    x = torch.tensor([[0.0, -0.0, 2.0, -3.0]], device=device, requires_grad=True)
    row_norm(x, 1.0, impl="kernel").sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, -1.0]]


def test_rows_beyond_the_limits_of_a_grid(device, emulated):
    """65,535 blocks are the limit of two of the three dimensions of a CUDA grid."""
    for rows in (65_535, 65_536, 65_537) if emulated else (65_535, 65_536, 200_001):
        x = torch.arange(rows, device=device, dtype=torch.float32)[:, None].expand(rows, 2).requires_grad_()
        norm = row_norm(x, 1.0, impl="kernel")
        assert torch.equal(norm, 2 * torch.arange(rows, device=device, dtype=torch.float32))


# ------------------------------------------------------------------ softmax_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 1e30])
def test_logits_may_be_huge(dtype, shift, device):
    classes = torch.tensor([0, 3, 6, 2], device=device)
    logits = (torch.randn(4, 7, dtype=torch.float64, device=device) * (1 + abs(shift) / 10) + shift).to(dtype)
    sample = Sample(softmax_cross_entropy, (logits, classes), {"label_smoothing": 0.1})
    grad, u = cotangents(sample)
    result = run(sample, grad, u)
    assert all(derivative.isfinite().all() for derivative in result)
    exact = reference.softmax_cross_entropy(logits.double(), classes, label_smoothing=0.1)
    eager = reference.softmax_cross_entropy(logits.float(), classes, label_smoothing=0.1)
    assert_as_accurate_as_reference(result.value, eager, exact)


@pytest.mark.parametrize("shift", [1e3, -1e3, 1e5])
def test_a_common_shift_of_all_logits_changes_nothing(shift, device):
    """The maximum and the logarithm of the sum are kept apart: as one number they would cost p its digits."""
    base = torch.randn(4, 7, device=device).mul(64).round().div(64)  # exact after the shift
    classes = torch.tensor([0, 3, 6, 2], device=device)
    plain, moved = (Sample(softmax_cross_entropy, (z, classes), {}) for z in (base, base + shift))
    grad, u = cotangents(plain)
    for actual, expected in zip(run(moved, grad, u), run(plain, grad, u), strict=True):
        assert_same_bits(actual, expected)


@over_dtypes
def test_impossible_classes(dtype, device):
    """Logits of -inf have probability zero and gradient zero, and cost nothing unless they are the target."""
    logits = torch.randn(3, 5, dtype=torch.float64).to(device, dtype)
    logits[0, 1] = logits[2, 4] = -math.inf
    sample = Sample(softmax_cross_entropy, (logits, torch.tensor([0, 3, 4], device=device)), {})
    grad, u = cotangents(sample)
    result = run(sample, grad, u)
    assert result.value[:2].isfinite().all()
    assert result.value[2] == math.inf
    assert result.grad_x.isfinite().all()
    assert result.second.isfinite().all()
    assert result.grad_x[0, 1] == 0
    assert result.second[0, 1] == 0
    finite = dataclasses.replace(sample, inputs=tuple(t[:2] for t in sample.inputs))
    expected = run(finite, grad[:2], u[:2], "reference")
    torch.testing.assert_close(result.value[:2], expected.value)
    torch.testing.assert_close(result.grad_x[:2], expected.grad_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certain_predictions(dtype, device):
    """Where p is 0 or 1 up to rounding, the loss and its derivatives are exact zeros or as small as they should be."""
    logits = torch.tensor([[0.0, 200.0, -200.0], [0.0, 5.0, -300.0]], device=device, dtype=dtype)
    sample = Sample(softmax_cross_entropy, (logits, torch.tensor([1, 1], device=device)), {})
    result = run(sample, *cotangents(sample))
    assert all(derivative.isfinite().all() for derivative in result)
    assert result.value[0] >= 0
    assert result.value[0] < torch.finfo(dtype).eps


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_many_classes(smoothing, device, emulated):
    classes = 2000 if emulated else 50_000
    logits = torch.randn(3, classes, device=device)
    sample = Sample(
        softmax_cross_entropy, (logits, torch.tensor([0, 1, 2], device=device)), {"label_smoothing": smoothing}
    )
    assert_accurate(sample, *cotangents(sample))


def test_gradients_sum_to_zero(device):
    """Softmax does not notice a common shift, so every derivative is orthogonal to the vector of ones."""
    logits = torch.randn(4, 9, device=device, dtype=torch.float64)
    classes = torch.tensor([1, 8, 0, 3], device=device)
    sample = Sample(softmax_cross_entropy, (logits, classes), {"label_smoothing": 0.2})
    result = run(sample, *cotangents(sample))
    for derivative in (result.grad_x, result.second):
        assert derivative.any()
        torch.testing.assert_close(derivative.sum(1), derivative.new_zeros(4))


@pytest.mark.parametrize("scale", [1.0, 0.3, 1.0009765625, 1e-3, 3e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_pytorch_does(dtype, scale, device):
    """ELU's slope on the positive side is a constant: the result is one product, rounded once."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for part in (every, every[5:12_345]):  # of a length that is no multiple of a vector's
        x = torch.ones_like(part)
        gg_grad, _ = torch.ops.robustkern.activation_double_backward(
            part, x, x, "elu", [1.0, scale, 1.0, 0.0], True, False
        )
        expected = (part.float() * scale).to(dtype)
        missing = part.isnan()
        assert torch.equal(gg_grad.isnan(), missing)
        assert torch.equal(gg_grad[~missing], expected[~missing])


@pytest.mark.parametrize("function", [F.elu, F.selu, F.celu, F.hardswish], ids=lambda f: f.__name__)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_pieces_at_what_is_not_finite(function, in_place, device):
    """Functions in pieces: NaN and infinity of x, g and u stay where PyTorch has them, lane by lane."""
    edges = torch.tensor([-math.inf, -1e30, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 1e30, math.inf, math.nan], device=device)
    x, g, u = (t.flatten().repeat(3) for t in torch.meshgrid(edges, edges, edges, indexing="ij"))

    def second(dtype: torch.dtype) -> list[torch.Tensor]:
        leaf, cotangent = x.to(dtype, copy=True).requires_grad_(), g.to(dtype, copy=True).requires_grad_()
        value = function(leaf * 1.0, inplace=in_place)
        (first,) = torch.autograd.grad(value, leaf, cotangent, create_graph=True)
        return list(torch.autograd.grad(first, (leaf, cotangent), u.to(dtype), materialize_grads=True))

    expected, exact = second(torch.float32), second(torch.float64)
    with robustkern.fused_double_backward():
        actual = second(torch.float32)
    for a, e, true in zip(actual, expected, exact):
        assert not (e.isfinite() & ~a.isfinite()).any()
        finite = e.isfinite() & a.isfinite() & true.isfinite()
        for some in (finite & (true.abs() < 1e6), finite):  # errors of the others would not show beside huge ones
            assert_as_accurate_as_reference(a[some], e[some], true[some], zero=not true[some].any())
