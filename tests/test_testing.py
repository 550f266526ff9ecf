"""The accuracy check itself: what it must not let pass."""

import pytest
import torch

from robustkern.testing import assert_as_accurate_as_reference, cast, derivatives

EXACT = torch.linspace(1.0, 2.0, 64, dtype=torch.float64)


def check(actual, eager=None, exact=EXACT, **options):
    assert_as_accurate_as_reference(actual, EXACT.to(torch.float32) if eager is None else eager, exact, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_passes_and_ten_eps_do_not(dtype):
    eager = EXACT.to(torch.float32 if dtype == torch.float64 else dtype)
    check(EXACT.to(dtype), eager)
    wrong = (EXACT * (1 + 10 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match=r"L2 error .* exceeds 2 \* .* worst at \["):
        check(wrong, eager)


def test_one_wrong_element_among_many():
    actual = EXACT.to(torch.float32)
    actual[37] *= 1 + 1e-5
    with pytest.raises(AssertionError, match=r"worst at \[37\]"):
        check(actual)


def test_what_is_not_a_question_of_rounding():
    fine = EXACT.to(torch.float32)
    refused = {
        "has shape": fine[:-1],
        r"is torch.float64 .* instead of torch.float32": None,
        r"1 of 64 elements are not finite": torch.cat([fine[1:], fine.new_tensor([float("nan")])]),
        "error 1 exceeds": torch.zeros_like(fine),
        "error 2 exceeds": -fine,
    }
    for message, actual in refused.items():
        with pytest.raises(AssertionError, match=message):
            check(EXACT.clone(), EXACT.clone()) if actual is None else check(actual)
    with pytest.raises(AssertionError, match="exact result must be float64"):
        check(fine, fine, fine)


def test_zero_must_be_announced():
    zeros = torch.zeros(3)
    with pytest.raises(AssertionError, match="nothing to compare with"):
        check(zeros, zeros, zeros.double())
    check(zeros, zeros, zeros.double(), zero=True)
    with pytest.raises(AssertionError, match="exact result is not zero"):
        check(EXACT.float(), zero=True)
    with pytest.raises(AssertionError, match="error"):
        check(zeros + 1e-3, zeros, zeros.double(), zero=True)


def test_a_broken_reference_excuses_nothing():
    nan = torch.full((64,), float("nan"))
    check(EXACT.float(), nan)
    with pytest.raises(AssertionError, match="error"):
        check(EXACT.float() * 1.01, nan)


def test_derivatives_of_a_cube():
    x, grad, u = (torch.tensor([v], dtype=torch.float64) for v in (2.0, 5.0, 7.0))
    value, grad_x, gg_grad, second = derivatives(lambda v: v**3, x, grad, u)
    assert (value, grad_x, gg_grad, second) == (8.0, 5 * 12.0, 7 * 12.0, 5 * 7 * 12.0)
    assert derivatives(lambda v: 2 * v, x, grad, u).second == 0


def test_cast_converts_numbers_only():
    given = {"a": (torch.ones(2, dtype=torch.float16), 3), "b": [torch.ones(2, dtype=torch.long)], "c": None}
    converted = cast(given)
    assert converted["a"][0].dtype == torch.float64
    assert converted["a"][1] == 3
    assert converted["b"][0].dtype == torch.long
    assert converted["c"] is None
