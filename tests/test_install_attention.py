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


def peak(length: int) -> int:
    """Bytes that the second backward of one head adds at its peak."""
    arguments = [torch.randn(1, 1, length, 8) for _ in range(7)]
    with torch.profiler.profile(profile_memory=True) as profile:
        ENTRY.operator(*arguments, None, False, 0.3, True, True, True, True)
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def test_memory_is_linear_in_the_sequence(not_emulated):
    short, long = peak(2048), peak(4096)
    assert 0 < long < 2.2 * short
    assert long < 4096 * 4096 * 4 / 2, "half a matrix of scores"


def test_no_matrix_of_scores_in_either_backward(not_emulated):
    x = torch.randn(1, 1, 1024, 8, requires_grad=True)
    with rk.fused_double_backward(), Allocated() as allocated:
        (grad,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)
    assert allocated.largest < 1024 * 1024 * 4 / 4


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
