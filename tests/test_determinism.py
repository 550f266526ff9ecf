"""The same bits: on every run, for every batch and number of threads, and whatever uninitialised memory held."""

import dataclasses

import pytest
import torch

from cases import assert_same_bits, cotangents, over_chains, over_dtypes, over_filled, recorded_calls, run


def assert_same_derivatives(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@over_dtypes
@over_filled
def test_repeats(case, dtype, device):
    sample = case.sample(device, dtype)
    grad, gg_x = cotangents(sample)
    expected = run(sample, grad, gg_x)
    for _ in range(3):
        assert_same_derivatives(run(sample, grad, gg_x), expected)


@over_dtypes
@over_chains
def test_a_row_alone_is_the_row_in_its_batch(case, dtype, device):
    sample = case.sample(device, dtype)
    grad, gg_x = cotangents(sample)
    batch = run(sample, grad, gg_x)
    for i in range(grad.shape[0]):
        row = slice(i, i + 1)
        alone = dataclasses.replace(sample, inputs=tuple(t[row] for t in sample.inputs))
        assert_same_derivatives(run(alone, grad[row], gg_x[row]), tuple(d[row] for d in batch))


def many_rows(sample, elements=300_000):
    """A batch large enough to be worth a second thread."""
    copies = max(2, elements // sample.inputs[0].numel())
    repeated = tuple(t.repeat(copies, *(1,) * (t.dim() - 1)) for t in sample.inputs)
    return dataclasses.replace(sample, inputs=repeated)


@pytest.mark.usefixtures("not_emulated")
@over_filled
def test_threads(case):
    before = torch.get_num_threads()
    sample = many_rows(case.sample("cpu", torch.float32))
    grad, gg_x = cotangents(sample)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(sample, grad, gg_x))
    finally:
        torch.set_num_threads(before)
    assert_same_derivatives(results[1], results[0])
    assert_same_derivatives(results[2], results[0])


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaNs."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@over_dtypes
@over_filled
def test_every_output_is_written(case, dtype, device):
    assert torch.empty(5, dtype=dtype, device=device).isnan().all()
    for call in recorded_calls(case.sample(device, dtype)).values():
        poisoned = call()
        torch.use_deterministic_algorithms(False)
        plain = call()
        torch.use_deterministic_algorithms(True)
        assert_same_bits(poisoned, plain)
        assert not any(t.isnan().any() for t in poisoned)
