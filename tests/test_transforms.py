"""torch.func: vmap runs the kernels; what differentiates through an operator falls back on the reference."""

import dataclasses

import pytest
import torch

from cases import (
    assert_accurate,
    assert_same_bits,
    cotangents,
    over_dtypes,
    over_small,
    over_small_chains,
    random_like,
    recorded_calls,
    run,
)
from robustkern.ops import row_norm, softmax_cross_entropy
from robustkern.testing import Derivatives, derivatives

LEVELS = 3


def stacked(sample):
    """LEVELS different first inputs, and cotangents for each."""
    x = torch.stack([random_like(sample.inputs[0], 10 + k) for k in range(LEVELS)])
    grad, u = cotangents(sample)
    grads = torch.stack([random_like(grad, 20 + k) for k in range(LEVELS)])
    return x, grads, torch.stack([random_like(u, 30 + k) for k in range(LEVELS)])


def one_by_one(function, *stacks):
    """The loop that vmap must equal."""
    return [torch.stack(parts) for parts in zip(*(function(*level) for level in zip(*stacks)))]


@over_dtypes
@over_small
def test_vmap_of_the_operator(case, dtype, device):
    sample = case.sample(device, dtype)
    x = stacked(sample)[0]
    (expected,) = one_by_one(lambda v: (sample(v, impl="kernel"),), x)
    assert_same_bits(torch.func.vmap(lambda v: sample(v, impl="kernel"))(x), expected)
    assert_same_bits(torch.func.vmap(lambda v: sample(v, impl="kernel"), in_dims=-1)(x.movedim(0, -1)), expected)


@over_small
def test_derivatives_of_vmap(case, device):
    sample = case.sample(device, torch.float32)
    x, grad, u = stacked(sample)
    batched = derivatives(torch.func.vmap(lambda v: sample(v, impl="kernel")), x, grad, u, sample.orders)
    expected = one_by_one(lambda *level: run(sample, *level[1:], x=level[0]), x, grad, u)
    for actual, e in zip(batched, expected, strict=True):
        assert_same_bits(actual, e)


def by_name(call, names):
    """A call as a function of the tensors with these names."""
    return lambda *tensors: call(**dict(zip(names, tensors)))


@over_small
@pytest.mark.parametrize("mapped", ["all arguments", "first argument"])
def test_vmap_of_each_registered_operator(case, mapped, device):
    for call in recorded_calls(case.sample(device, torch.float32)).values():
        names = [name for name in call.tensors if name != "weight"]  # which is shared by all rows
        tensors = [call.tensors[name] for name in names]
        both = [(torch.stack([t, t.flip(0), t]), 0) for t in tensors]
        if mapped == "first argument":
            both[1:] = [(t, None) for t in tensors[1:]]
        stacks = [t if dim == 0 else torch.stack([t] * LEVELS) for t, dim in both]
        function = by_name(call, names)
        actual = torch.func.vmap(function, in_dims=tuple(dim for _, dim in both))(*(t for t, _ in both))
        for a, e in zip(actual, one_by_one(function, *stacks), strict=True):
            assert_same_bits(a, e)


@over_small_chains
def test_vmap_over_cotangents_alone(case, device):
    sample = case.sample(device, torch.float32)
    x = sample.inputs[0].detach().requires_grad_()
    _, grads, us = stacked(sample)
    value = sample(x, impl="kernel")
    (batched,) = torch.autograd.grad(value, x, grads, is_grads_batched=True, create_graph=True)
    (expected,) = one_by_one(lambda g: torch.autograd.grad(value, x, g, retain_graph=True), grads)
    assert_same_bits(batched.detach(), expected)
    if "second" in sample.zero:
        return
    (grad_x,) = torch.autograd.grad(value, x, grads[0], create_graph=True)
    (batched,) = torch.autograd.grad(grad_x, x, us, is_grads_batched=True, retain_graph=True)
    (expected,) = one_by_one(lambda g: torch.autograd.grad(grad_x, x, g, retain_graph=True), us)
    assert_same_bits(batched, expected)


@over_small
def test_vmap_in_vmap(case, device):
    sample = case.sample(device, torch.float32)
    x = stacked(sample)[0]
    nested = torch.stack([x, 2 * x])
    actual = torch.func.vmap(torch.func.vmap(lambda v: sample(v, impl="kernel")))(nested)
    expected = [one_by_one(lambda v: (sample(v, impl="kernel"),), level)[0] for level in nested]
    assert_same_bits(actual, torch.stack(expected))


def test_vmap_over_a_target(device):
    logits, targets = torch.randn(4, 5, device=device), torch.arange(12, device=device).view(3, 4) % 5
    actual = torch.func.vmap(lambda t: softmax_cross_entropy(logits, t, impl="kernel"))(targets)
    (expected,) = one_by_one(lambda t: (softmax_cross_entropy(logits, t, impl="kernel"),), targets)
    assert_same_bits(actual, expected)


def test_vmap_over_an_argument_shared_by_all_rows_is_refused(device):
    x, weights = torch.randn(4, 3, device=device), torch.rand(2, 3, device=device)
    with pytest.raises(NotImplementedError, match="vmap over argument 1 is not supported"):
        torch.func.vmap(lambda w: row_norm(x, weight=w, impl="kernel"))(weights)


def scalar(sample, grad):
    return lambda v: (grad * sample(v)).sum()


@over_small_chains
def test_func_grad_and_grad_of_grad(case, device):
    sample = case.sample(device, torch.float32)
    grad, u = cotangents(sample)
    x = sample.inputs[0]
    value = sample(x)
    grad_x = torch.func.grad(scalar(sample, grad))(x)
    second = torch.func.grad(lambda v: (torch.func.grad(scalar(sample, grad))(v) * u).sum())(x)
    gg_grad = torch.func.grad(lambda g: (torch.func.grad(scalar(sample, g))(x) * u).sum())(grad)
    assert_accurate(sample, grad, u, Derivatives(value, grad_x, gg_grad, second))


@over_small_chains
def test_forward_mode(case, device):
    sample = case.sample(device, torch.float32)
    grad, u = cotangents(sample)
    value, tangent = torch.func.jvp(sample, (sample.inputs[0],), (u,))
    expected = run(dataclasses.replace(sample), torch.ones_like(grad), u)
    assert_accurate(sample, torch.ones_like(grad), u, expected._replace(value=value, gg_grad=tangent))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sample.inputs[0], u)
        assert_same_bits(torch.autograd.forward_ad.unpack_dual(sample(dual)).tangent, tangent)


@over_small_chains
def test_hessian_applied_to_a_vector(case, device):
    sample = case.sample(device, torch.float64)
    if sample.inputs[0].numel() > 100:
        sample = dataclasses.replace(sample, inputs=tuple(t[:1] for t in sample.inputs))
    grad, u = cotangents(sample)
    hessian = torch.func.hessian(scalar(sample, grad))(sample.inputs[0])
    product = (hessian * u).flatten(sample.inputs[0].dim()).sum(-1)
    second = run(sample, grad, u).second
    torch.testing.assert_close(product, second)


@over_small
def test_insisting_on_the_kernel_under_a_transform_is_an_error(case, device):
    sample = case.sample(device, torch.float32)
    with pytest.raises(RuntimeError, match=r"not possible: torch\.func\.grad, vjp and jvp need the reference"):
        torch.func.grad(lambda v: sample(v, impl="kernel").sum())(sample.inputs[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sample.inputs[0], torch.ones_like(sample.inputs[0]))
        with pytest.raises(RuntimeError, match="forward-mode differentiation needs the reference"):
            sample(dual, impl="kernel")


def test_per_sample_gradients_of_parameters(device):
    """vmap over grad, the usual recipe, equals a loop."""
    weights = torch.randn(6, 4, device=device, dtype=torch.float64)
    x, y = torch.randn(5, 6, device=device, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0], device=device)

    def loss(w, x_i, y_i):
        return softmax_cross_entropy((x_i @ w)[None], y_i[None])[0]

    actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    expected = []
    for x_i, y_i in zip(x, y):
        w = weights.clone().requires_grad_()
        softmax_cross_entropy((x_i @ w)[None], y_i[None], impl="kernel").sum().backward()
        expected.append(w.grad)
    torch.testing.assert_close(actual, torch.stack(expected))
