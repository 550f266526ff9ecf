"""Attention under robustkern.install(): tests beyond those that every replaced operator has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk
from robustkern.ops._pytorch_derivatives import DERIVATIVES
from robustkern.testing import assert_as_accurate_as_reference, cast
from tests.samples import samples_of

NAME = "attention_double_backward"
ENTRY = DERIVATIVES[NAME]
BACKWARDS = ("flash_attention", "efficient_attention", "cudnn_attention")


def blocked(*arguments: Any) -> tuple[Tensor, ...]:
    """Runs the implementation for CUDA tensors on CPU tensors."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return ENTRY.operator.default.redispatch(cuda, *arguments)


def math(function: Callable[..., Any], *arguments: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return function(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [s.name for s in samples_of(NAME)])
def test_blocks_of_matrix_products(name, dtype):
    sample = next(s for s in samples_of(NAME, "cpu", dtype) if s.name == name)
    exact = ENTRY.reference(*cast(sample.arguments).values())
    narrow = torch.float32 if dtype == torch.float64 else dtype
    eager = ENTRY.reference(*cast(sample.arguments, narrow).values())
    expected = ENTRY.operator(*sample.arguments.values())
    for i, (a, r, e) in enumerate(zip(blocked(*sample.arguments.values()), eager, exact, strict=True)):
        assert a.stride() == expected[i].stride()
        assert_as_accurate_as_reference(a, r.to(narrow), e, zero=i in sample.zero, what=f"{name} {ENTRY.outputs[i]}")


def test_stock_raises_in_the_second_backward():
    q = torch.randn(1, 2, 4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        grad.sum().backward()


def penalty_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    (grad,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    return list(torch.autograd.grad(grad.square().sum(), tuple(module.parameters()), allow_unused=True))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfAttention(8, 2, batch_first=True, dtype=torch.float64),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64),
    ],
    ids=["MultiheadAttention", "TransformerEncoderLayer"],
)
def test_modules_train_with_a_gradient_penalty(make):
    module, x = make(), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    expected = math(penalty_gradients, module, x)
    with rk.fused_double_backward():
        actual = penalty_gradients(module, x)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a - e).norm() <= 1e-9 * (1 + e.norm())


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


def peak(work: Callable[[], Any]) -> int:
    """Bytes that a call adds at its peak."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def second_backward(length: int) -> Any:
    arguments = [torch.randn(1, 1, length, 8) for _ in range(7)]
    return ENTRY.operator(*arguments, None, None, None, False, 0.3, True, True, True, True)


def both_backwards(length: int, causal: bool = False) -> Any:
    x = torch.randn(1, 1, length, 8, requires_grad=True)
    with rk.fused_double_backward():
        out = F.scaled_dot_product_attention(x, x, x, is_causal=causal)
        (grad,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)


def of_several_cotangents(length: int) -> Any:
    x = torch.randn(1, 1, length, 8, requires_grad=True)
    with rk.fused_double_backward():
        out = F.scaled_dot_product_attention(x, x, x)
        first = torch.func.vmap(lambda g: torch.autograd.grad(out, x, g, create_graph=True)[0])
        return torch.autograd.grad(first(torch.randn(3, *out.shape)).square().sum(), x)


@pytest.mark.parametrize(
    "work",
    [second_backward, both_backwards, lambda length: both_backwards(length, causal=True), of_several_cotangents],
    ids=["second backward", "both backwards", "causal", "several cotangents"],
)
def test_memory_is_linear_in_the_sequence(work, not_emulated):
    short, long = peak(lambda: work(2048)), peak(lambda: work(4096))
    assert 0 < long < 2.2 * short
    assert long < 4096 * 4096 * 4 / 2, "half a matrix of scores"


def test_no_matrix_of_scores_in_either_backward(not_emulated):
    x = torch.randn(1, 1, 1024, 8, requires_grad=True)
    with rk.fused_double_backward(), Allocated() as allocated:
        (grad,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)
    assert allocated.largest < 1024 * 1024 * 4 / 4


class Handed(torch.utils._python_dispatch.TorchDispatchMode):
    """What the operator is given of the forward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ENTRY.operator.default:
            names = [argument.name for argument in func._schema.arguments]
            self.out, self.logsumexp = (args[names.index(name)] for name in ("out", "logsumexp"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5, dtype=torch.bool)], ids=["no mask", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_the_forward_saved_is_used(mask, dtype):
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    with rk.fused_double_backward(), Handed() as handed:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        (grad,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        grad.square().sum().backward()
    if mask is not None:  # which may hide a whole row
        assert handed.out is None and handed.logsumexp is None
        return
    assert handed.out.data_ptr() == out.data_ptr() and not handed.out.requires_grad
    eager, exact = ((q.to(t) @ k.to(t).mT / 2).logsumexp(-1) for t in (torch.float32, torch.float64))
    assert_as_accurate_as_reference(handed.logsumexp, eager, exact, what="logsumexp")


def test_out_changed_in_place_is_noticed():
    q = torch.randn(1, 2, 4, 3, requires_grad=True)
    with rk.fused_double_backward():
        out = F.scaled_dot_product_attention(q, q, q)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        out.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            grad.sum().backward()


@pytest.mark.parametrize("alone", ["out", "logsumexp"])
def test_half_of_what_a_forward_saves_is_refused(alone):
    sample = next(samples_of(NAME))
    arguments = {**sample.arguments, ("logsumexp" if alone == "out" else "out"): None}
    with pytest.raises(RuntimeError, match=f"out and logsumexp must be given both or neither, got {alone} alone"):
        ENTRY.operator(*arguments.values())


def test_logsumexp_is_in_the_accumulation_type():
    sample = next(samples_of(NAME, dtype=torch.bfloat16))
    arguments = {**sample.arguments, "logsumexp": sample.arguments["logsumexp"].bfloat16()}
    with pytest.raises(RuntimeError, match=r"logsumexp must be \[2, 3, 5\] float32 on cpu, got \[2, 3, 5\] bfloat16"):
        ENTRY.operator(*arguments.values())


@pytest.mark.parametrize("backend", BACKWARDS)
def test_signatures_of_the_cuda_backends(backend):
    """They are replaced on the key of CUDA tensors too."""
    name = f"aten::_scaled_dot_product_{backend}_backward"
    with rk.fused_double_backward():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCUDA")


def test_row_without_keys_has_no_gradient():
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([True, False, True])[:, None].expand(3, 3)
    with rk.fused_double_backward():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
    assert all(g.isfinite().all() and g.any() for g in second)
    assert not second[0][0, 0, 1].any()
