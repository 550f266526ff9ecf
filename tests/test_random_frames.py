"""Orthonormal frames of few dimensions, which the CPU draws for a register of samples at a time."""

import pytest
import torch

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
        torch.testing.assert_close(kernel, reference, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)
