"""Value, gradient and double backward of every operator, as accurate as the reference allows, in every dtype."""

import pytest
import torch

from cases import assert_accurate, cotangents, over_dtypes, over_filled, over_small


@pytest.mark.every_value
@over_dtypes
@over_filled
def test_value_and_derivatives(case, dtype, device):
    sample = case.sample(device, dtype)
    assert_accurate(sample, *cotangents(sample))


@over_small
def test_formulas_are_the_derivatives_of_the_values(case, device):
    """Compared with finite differences, which do not use the reference; in random directions for many inputs."""
    sample = case.sample(device, torch.float64)
    x = sample.inputs[0].detach().requires_grad_()

    def call(v):
        return sample(v, impl="kernel")

    fast = case.elements > 60
    if case.orders == 0:
        assert not call(x).requires_grad
        return
    assert torch.autograd.gradcheck(call, (x,), fast_mode=fast)
    if case.orders == 1:
        return
    grad = cotangents(sample)[0].requires_grad_()
    assert torch.autograd.gradgradcheck(call, (x,), (grad,), gen_non_contig_grad_outputs=True, fast_mode=fast)
