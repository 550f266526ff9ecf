"""Orthonormal frames of few dimensions, which the CPU draws for a register of samples at a time."""

import pytest
import torch

from jacobian_cases import assert_equal_but_for_rounding
from robustkern import reference
from robustkern.ops import random_cotangents


@pytest.mark.parametrize("kind", ["plain", "centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5, 7, 10, 16, 17])
def test_frames_of_many_samples_are_those_of_the_reference(dimensions, dtype, kind, device):
    """Whole registers of samples and what is left over, blocks of four numbers that fit and that overlap."""
    outputs, seed = torch.zeros(19, dimensions, dtype=dtype, device=device), torch.tensor([3], device=device)
    for projections in sorted({1, dimensions // 2, dimensions}):
        kernel, reference = (
            random_cotangents(outputs, projections, law="orthonormal", kind=kind, seed=seed, impl=impl)
            for impl in ("kernel", "reference")
        )
        assert kernel.flatten(2).norm(dim=2).max() > 0.5
        assert_equal_but_for_rounding(kernel, reference)


def test_the_reference_is_orthonormal_under_autocast(device):
    """A matrix product in it would be rounded to 16 bits."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        w = reference.random_cotangents(
            torch.zeros(4, 10, device=device), 10, law="orthonormal", seed=torch.tensor([3], device=device)
        )
    frames = w.transpose(0, 1).double()
    gram = (frames @ frames.mT / 10).float()
    assert_equal_but_for_rounding(gram, torch.eye(10, device=device).expand(4, -1, -1))
