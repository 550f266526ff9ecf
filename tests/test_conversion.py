"""16-bit storage: every bit pattern is read, and every result is rounded, as PyTorch does."""

import pytest
import torch

from cases import assert_same_bits
from robustkern.ops import row_norm

LOW = [torch.float16, torch.bfloat16]
over_low = pytest.mark.parametrize("dtype", LOW, ids=str)


def all_patterns(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_but_nan(actual, expected):
    """Equal bits, where any NaN is as good as any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    zero = actual.new_zeros(())
    assert_same_bits(torch.where(actual.isnan(), zero, actual), torch.where(expected.isnan(), zero, expected))


@over_low
@pytest.mark.parametrize("columns", [1, 64])
def test_every_number_is_read_as_it_is(dtype, columns, device):
    """The largest entry of a row of equal ones is |x|, and its sign comes back in the gradient."""
    patterns = all_patterns(dtype).to(device)
    x = patterns[:, None].repeat(1, columns) if columns == 1 else patterns.view(-1, columns)
    if columns == 1:
        same_but_nan(row_norm(x, 1.0, impl="kernel"), patterns.float().abs())
        return
    expected = x.float().abs().amax(1)  # through the vector code, a row at a time
    same_but_nan(row_norm(x, torch.inf, impl="kernel"), expected)
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x))
    leaf = finite.requires_grad_()
    row_norm(leaf, 1.0, impl="kernel").sum().backward()
    assert torch.equal(leaf.grad.float(), finite.detach().float().sign())


def numbers_to_round(dtype):
    """Every 16-bit number, the numbers half way between neighbours, and those just beside them, in float32."""
    finite = all_patterns(dtype).float()
    finite = finite[finite.isfinite()].unique()
    middle = (finite[:-1].double() + finite[1:].double()) / 2
    middle = middle.float()[middle.float().double() == middle]
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-torch.inf, torch.inf)]
    largest = torch.tensor([torch.finfo(dtype).max * 1.001, 3.4e38, torch.inf, torch.nan, 1e-45, 1e-40, 0.0])
    largest[0] = min(float(largest[0]), 3.4e38)
    some = torch.cat([finite, middle, *beside, largest])
    return torch.cat([some, -some])


@over_low
@pytest.mark.parametrize("columns", [1, 32])
def test_every_rounding(dtype, columns, device):
    """grad . sign(x) leaves the backward of the L1 norm rounded to the type of x."""
    numbers = numbers_to_round(dtype).to(device)
    x = torch.ones(numbers.numel(), columns, dtype=dtype, device=device)
    norm = row_norm(x, 1.0, impl="kernel").detach()
    rounded = torch.ops.robustkern.row_norm_backward(numbers, x, norm, None, 1, 1.0, False)
    for column in (0, columns - 1):
        same_but_nan(rounded[:, column].contiguous(), numbers.to(dtype))


@pytest.mark.parametrize("elements", [7, 16, 2**16 + 5])
@pytest.mark.parametrize("of_x", [False, True], ids=["x unread", "x read"])
@over_low
def test_batch_norm_reads_and_rounds_every_number(dtype, of_x, elements, device):
    """With fixed statistics, every result is what float32 gives for the same numbers, rounded once."""
    u = all_patterns(dtype).repeat(2)[:elements].view(1, 1, -1).to(device)
    x, grad = torch.full_like(u, 3.0), u.flip(-1)
    one = torch.ones(1, device=device)
    mean = one if of_x else one * torch.inf  # mean is not read where x is not
    scale = one * (1 + 2.0**-9)  # a half-way case for bfloat16 results, a small change for float16 ones

    def results(*tensors):
        u, g, x = tensors
        a = one / 3 if of_x else None
        op = torch.ops.robustkern.batch_norm_double_backward
        return op(u, a, None, g, x, None, mean, scale, False, True, of_x, False)[: 1 + of_x]

    for low, wide in zip(results(u, grad, x), results(u.float(), grad.float(), x.float()), strict=True):
        same_but_nan(low, wide.to(dtype))
        assert low.isfinite().sum() > 0.9 * elements and low.count_nonzero() > 0.5 * elements
