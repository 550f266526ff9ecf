"""Autograd's habits: cotangents of every kind and layout, graphs used twice, partial graphs, untouched inputs."""

import pytest
import torch

from cases import (
    assert_accurate,
    assert_same_bits,
    cotangents,
    over_dtypes,
    over_filled,
    over_small,
    over_small_chains,
    recorded_calls,
    run,
)


def transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], -1)[..., 0]


def interleaved(t):
    return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


# Each turns the random cotangents of the value and of the gradient into what autograd might send instead.
KINDS = {
    "one a row": lambda grad, u: (torch.arange(1, grad.numel() + 1).to(grad).view_as(grad), u),
    "one number for all": lambda grad, u: (grad.flatten()[0].expand(grad.shape), u),
    "expanded along rows": lambda grad, u: (grad, u[:1].expand_as(u)),
    "interleaved": lambda grad, u: (interleaved(grad), interleaved(u)),
    "transposed": lambda grad, u: (grad, transposed(u)),
    "flipped": lambda grad, u: (grad.flip(0), u.flip(0)),
    "contiguous": lambda grad, u: (grad.contiguous(), u.contiguous()),
}


@over_filled
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_cotangents(case, kind, device):
    sample = case.sample(device, torch.float32)
    assert_accurate(sample, *KINDS[kind](*cotangents(sample)))


@over_small
def test_a_cotangent_of_one_number(case, device):
    """The cotangent of .sum(): all strides are zero.  For softmax it is the zero direction, so bits are compared."""
    sample = case.sample(device, torch.float32)
    grad, u = (t.flatten()[0].expand(t.shape) for t in cotangents(sample))
    expanded, dense = run(sample, grad, u), run(sample, grad.contiguous(), u.contiguous())
    for actual, expected in zip(expanded, dense, strict=True):
        assert_same_bits(actual, expected)


@over_small
def test_zero_cotangents_give_zeros(case, device):
    sample = case.sample(device, torch.float32)
    grad, u = cotangents(sample)
    result = run(sample, torch.zeros_like(grad), u)
    assert not result.grad_x.any()
    assert not result.second.any()
    assert result.gg_grad.any() or "gg_grad" in sample.zero
    result = run(sample, grad, torch.zeros_like(u))
    assert not result.gg_grad.any()
    assert not result.second.any()
    assert result.grad_x.any() or "grad_x" in sample.zero


@over_dtypes
@over_small
def test_operators_write_to_no_input(case, dtype, device):
    for call in recorded_calls(case.sample(device, dtype)).values():
        before = {name: (tensor.clone(), tensor._version) for name, tensor in call.tensors.items()}
        results = call()
        for name, tensor in call.tensors.items():
            assert_same_bits(tensor, before[name][0])
            assert tensor._version == before[name][1], f"{call.name} bumped the version of {name}"
            for result in results:
                shared = result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                assert not shared or not result.numel(), f"{call.name} returns memory of {name}"


@over_small_chains
def test_one_graph_serves_several_backwards(case, device):
    sample = case.sample(device, torch.float32)
    x = sample.inputs[0].detach().requires_grad_()
    grad, u = cotangents(sample)
    value = sample(x, impl="kernel")
    (first,) = torch.autograd.grad(value, x, grad, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, x, 2 * grad, retain_graph=True)
    (again,) = torch.autograd.grad(value, x, grad, create_graph=True)
    assert_same_bits(first, kept)
    assert_same_bits(again.detach(), kept)
    assert_same_bits(second, 2 * kept)
    if "second" in sample.zero:
        return
    (hvp,) = torch.autograd.grad(again, x, u, retain_graph=True)
    (twice,) = torch.autograd.grad(again, x, 2 * u, retain_graph=True)
    (once_more,) = torch.autograd.grad(again, x, u)
    assert_same_bits(hvp, once_more)
    assert_same_bits(twice, 2 * hvp)


@over_small_chains
def test_what_requires_grad_gets_one_and_the_rest_does_not(case, device):
    sample = case.sample(device, torch.float32)
    grad, u = cotangents(sample)
    expected = run(sample, grad, u)
    assert not sample(impl="kernel").requires_grad
    backward = recorded_calls(sample)[f"{case.op}_backward"]
    first = sample.inputs[0].detach().requires_grad_()
    with torch.no_grad():
        assert not sample(first, impl="kernel").requires_grad
    # Only the cotangent of the value is differentiated, then only the input.
    grad = grad.detach().requires_grad_()
    (grad_x,) = torch.autograd.grad(sample(first, impl="kernel"), first, grad, create_graph=True)
    (gg_grad,) = torch.autograd.grad(grad_x, grad, u)
    assert_same_bits(gg_grad, expected.gg_grad)
    (grad_x,) = torch.autograd.grad(sample(first, impl="kernel"), first, grad.detach(), create_graph=True)
    if "second" not in sample.zero:
        (second,) = torch.autograd.grad(grad_x, first, u)
        assert_same_bits(second, expected.second)
    names = list(backward.tensors)
    alone = backward(**{names[0]: backward.tensors[names[0]].clone().requires_grad_()})
    assert alone[0].requires_grad
    assert not backward()[0].requires_grad


@over_small_chains
def test_third_order_is_refused(case, device):
    sample = case.sample(device, torch.float64)
    x = sample.inputs[0].detach().requires_grad_()
    grad, u = (t.requires_grad_() for t in cotangents(sample))
    (grad_x,) = torch.autograd.grad(sample(x, impl="kernel"), x, grad, create_graph=True)
    gg_grad, second = torch.autograd.grad(grad_x, (grad, x), u, create_graph=True, allow_unused=True)
    for derivative in (gg_grad, second):
        if derivative is not None:
            with pytest.raises(RuntimeError, match="third-order derivatives are not supported; use impl='reference'"):
                derivative.sum().backward(retain_graph=True)


@over_small_chains
def test_the_reference_has_a_third_order(case, device):
    sample = case.sample(device, torch.float64)
    x = sample.inputs[0].detach().requires_grad_()
    u = cotangents(sample)[1]
    (grad_x,) = torch.autograd.grad(sample(x, impl="reference").sum(), x, create_graph=True)
    if grad_x.requires_grad and "second" not in sample.zero:
        (second,) = torch.autograd.grad(grad_x, x, u, create_graph=True)
        if second.requires_grad:  # false where the third derivative is identically zero
            torch.autograd.grad(second.sum(), x, allow_unused=True)


@over_small_chains
def test_leaf_gradients_accumulate(case, device):
    sample = case.sample(device, torch.float32)
    x = sample.inputs[0].detach().clone().requires_grad_()
    grad = cotangents(sample)[0]
    for _ in range(2):
        sample(x, impl="kernel").backward(grad)
    assert_same_bits(x.grad, 2 * run(sample, *cotangents(sample)).grad_x)
