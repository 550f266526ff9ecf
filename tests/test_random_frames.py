"""Orthonormal frames of few dimensions, which the CPU draws for a register of samples at a time."""

import pytest
import torch

from jacobian_cases import assert_equal_but_for_rounding
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
