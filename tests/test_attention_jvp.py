"""attention_jvp, and forward mode over attention under robustkern.install(): tests beyond those of every derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk
from robustkern import reference
from robustkern.ops import attention_jvp
from robustkern.ops._pytorch_derivatives import DERIVATIVES
from robustkern.testing import assert_as_accurate_as_reference, cast
from tests.samples import samples_of

ENTRY = DERIVATIVES["attention_jvp"]
over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def blocked(*arguments: Any) -> tuple[Tensor, ...]:
    """Runs the implementation for CUDA tensors on CPU tensors."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return ENTRY.operator.default.redispatch(cuda, *arguments)


over_implementations = pytest.mark.parametrize("run", [ENTRY.operator, blocked], ids=["kernel", "blocks"])


def heads(count: int, *shape: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))


@over_dtypes
@pytest.mark.parametrize("name", [s.name for s in samples_of("attention_jvp")])
def test_blocks_of_matrix_products(name, dtype):
    sample = next(s for s in samples_of("attention_jvp", "cpu", dtype) if s.name == name)
    exact = ENTRY.reference(*cast(sample.arguments).values())
    narrow = torch.float32 if dtype == torch.float64 else dtype
    eager = ENTRY.reference(*cast(sample.arguments, narrow).values())
    expected = ENTRY.operator(*sample.arguments.values())
    for i, (a, r, e) in enumerate(zip(blocked(*sample.arguments.values()), eager, exact, strict=True)):
        assert a.stride() == expected[i].stride() and a.dtype == expected[i].dtype
        rounding = torch.float32 if a.dtype == torch.float64 else a.dtype
        assert_as_accurate_as_reference(a, r.to(rounding), e, zero=i in sample.zero, what=f"{name} {ENTRY.outputs[i]}")


@over_implementations
@over_dtypes
def test_a_row_without_keys_is_zero_whatever_moves(run, dtype):
    q, k, v, dq, dk, dv = (t.to(dtype) for t in heads(6, 1, 2, 4, 8))
    mask = torch.where(torch.arange(4) == 1, -torch.inf, 0.0).to(dtype)[:, None].expand(4, 4)
    out, tangent, logsumexp = run(q, k, v, dq, dk, dv, mask, torch.ones_like(mask), False, 0.5)
    assert not out[:, :, 1].any() and not tangent[:, :, 1].any()
    assert (logsumexp[:, :, 1] == -torch.inf).all()
    rest = [0, 2, 3]
    expected = run(q[:, :, rest], k, v, dq[:, :, rest], dk, dv, None, None, False, 0.5)
    for actual, e in zip((out, tangent, logsumexp), expected, strict=True):
        torch.testing.assert_close(actual[:, :, rest], e)


@over_implementations
def test_no_keys(run):
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    out, tangent, logsumexp = run(q, k, k, q, k, k, None, None, False, 0.5)
    assert out.shape == tangent.shape == q.shape and not out.any() and not tangent.any()
    assert (logsumexp == -torch.inf).all()


@over_implementations
def test_not_a_number_stays_in_its_row(run):
    q, k, v, dq, dk, dv = (t.float() for t in heads(6, 1, 2, 40, 8))
    expected = run(q, k, v, dq, dk, dv, None, None, False, 0.5)
    for spoilt, results in ((q, (0, 1, 2)), (dq, (1,))):
        value = spoilt[0, 1, 7, 3].clone()
        spoilt[0, 1, 7, 3] = torch.nan
        actual = run(q, k, v, dq, dk, dv, None, None, False, 0.5)
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert a[0, 1, 7].isnan().all() == (i in results)
            others = torch.ones(2, 40, dtype=torch.bool)
            others[1, 7] = False
            assert a[0][others].equal(e[0][others])
        spoilt[0, 1, 7, 3] = value


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"mask": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)},
    "mask of queries": {"mask": torch.linspace(-1, 1, 3).view(3, 1)},
    "boolean mask": {"mask": torch.arange(24).view(2, 3, 4) % 3 != 1},
    "scale": {"scale": 2.0},
}


def inputs(key_heads: int = 2, value_size: int = 2) -> list[Tensor]:
    shapes = ((1, 2, 3, 3), (1, key_heads, 4, 3), (1, key_heads, 4, value_size)) * 2
    return [heads(1, *shape, seed=i)[0].requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(("key_heads", "value_size"), [(2, 3), (1, 3), (2, 2)])
def test_derivatives(options, key_heads, value_size):
    """In q, k, v and their tangents: backwards once by kernels, twice composed; forwards by the reference."""
    tensors = inputs(key_heads, value_size)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return attention_jvp(*tensors, **options)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_derivatives_where_a_row_has_no_keys():
    tensors = inputs(value_size=3)
    mask = torch.tensor([[True], [False], [True]]).expand(3, 4)
    assert torch.autograd.gradcheck(lambda *t: attention_jvp(*t, mask=mask), tensors)


@pytest.mark.parametrize("empty", [(0, 3, 4), (1, 0, 4), (1, 3, 0)], ids=str)
def test_derivatives_of_empty_tensors(empty):
    batch, queries, keys = empty
    shapes = ((batch, 2, queries, 3), (batch, 2, keys, 3), (batch, 2, keys, 3)) * 2
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    grads = torch.autograd.grad(sum(t.sum() for t in attention_jvp(*tensors)), tensors)
    assert not any(g.any() for g in grads)


def test_derivatives_in_a_mask():
    q, k, v, *tangents = inputs()
    mask, moved = (torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_() for _ in range(2))

    def function(mask: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        return attention_jvp(q, k, v, *tangents, mask=mask, mask_tangent=moved)

    assert torch.autograd.gradcheck(function, (mask, moved))
    assert torch.autograd.gradgradcheck(function, (mask, moved))


@pytest.mark.parametrize("moving", ["q", "k", "v", "qv", ""])
def test_absent_tangents_are_zeros(moving):
    q, k, v, *tangents = inputs()
    some = [t if name in moving else None for name, t in zip("qkv", tangents, strict=True)]
    zeros = [torch.zeros_like(t) if s is None else t for s, t in zip(some, tangents, strict=True)]
    for a, e in zip(attention_jvp(q, k, v, *some), attention_jvp(q, k, v, *zeros), strict=True):
        torch.testing.assert_close(a, e)
        grads = torch.autograd.grad(a.sin().sum(), (q, k, v), retain_graph=True, materialize_grads=True)
        for g, h in zip(grads, torch.autograd.grad(e.sin().sum(), (q, k, v), retain_graph=True), strict=True):
            torch.testing.assert_close(g, h)


@pytest.mark.parametrize("mapped", [(0, 3), (3, 4, 5), (0, 1, 2, 3, 4, 5), (6,), (3, 7), (6, 7)])
@pytest.mark.parametrize("mask_shape", [(3, 4), (2, 1, 1, 4)], ids=str)
def test_vmap(mapped, mask_shape):
    shapes = (
        (2, 2, 3, 3),
        (2, 2, 4, 3),
        (2, 2, 4, 2),
        (2, 2, 3, 3),
        (2, 2, 4, 3),
        (2, 2, 4, 2),
        mask_shape,
        mask_shape,
    )
    arguments = [heads(1, *((5, *shape) if i in mapped else shape), seed=i)[0] for i, shape in enumerate(shapes)]
    dims = [0 if i in mapped else None for i in range(8)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return ENTRY.operator(*tensors, False, 0.5)

    batched = torch.func.vmap(call, in_dims=tuple(dims))(*arguments)
    for i in range(5):
        one = call(*(t[i] if d == 0 else t for t, d in zip(arguments, dims, strict=True)))
        for a, e in zip(batched, one, strict=True):
            assert a[i].equal(e)


def test_compiled(not_emulated):
    arguments = inputs()
    for impl in ("kernel", "reference"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *t, impl=impl: attention_jvp(*t, causal=True, impl=impl), backend="aot_eager")
        results, expected = compiled(*arguments), attention_jvp(*arguments, causal=True)
        grads = torch.autograd.grad(sum(r.sin().sum() for r in results), arguments)
        others = torch.autograd.grad(sum(r.sin().sum() for r in expected), arguments)
        for a, e in zip((*results, *grads), (*expected, *others), strict=True):
            torch.testing.assert_close(a, e)


# ------------------------------------------------------------------ memory


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a call adds at its peak."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def _operator(q: Tensor, v: Tensor) -> Any:
    return ENTRY.operator(q, q, q, v, v, v, None, None, False, 0.3)


def _jvp(q: Tensor, v: Tensor) -> Any:
    return torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (v,))


def _reverse_over_jvp(q: Tensor, v: Tensor) -> Any:
    q = q.requires_grad_()
    value, tangent = _jvp(q, v)
    return torch.autograd.grad(value.square().sum() + tangent.square().sum(), q)


def _jvp_of_grad(q: Tensor, v: Tensor) -> Any:
    grad = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).square().sum())
    return torch.func.jvp(grad, (q,), (v,))


@pytest.mark.parametrize("function", [_operator, _jvp, _reverse_over_jvp, _jvp_of_grad])
def test_memory_is_linear_in_the_sequence(function, not_emulated):
    """Value, tangent, their gradients, and a Hessian's product with a vector, all without a matrix of scores."""
    rk.install()

    def of(length: int) -> int:
        q, v = (t.float() for t in heads(2, 1, 1, length, 8))
        return peak(lambda: function(q, v))

    short, long = of(2048), of(4096)
    assert 0 < long < 2.2 * short
    assert long < 4096 * 4096 * 4 / 2, "half a matrix of scores"


# ------------------------------------------------------------------ the reference


def test_the_reference_is_the_derivative_of_the_math_backend():
    """By dual numbers, in value, tangent and the gradients of both."""
    q, k, v, *tangents = inputs()

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(F.scaled_dot_product_attention, tensors[:3], tensors[3:])

    actual = reference.attention_jvp(q, k, v, *tangents, scale=3**-0.5)
    expected = both(q, k, v, *tangents)
    scores = q @ k.mT * 3**-0.5
    torch.testing.assert_close(actual[2], scores.exp().sum(-1).log())
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)
        gradients = [torch.autograd.grad(t.sin().sum(), (q, k, v, *tangents), materialize_grads=True, retain_graph=True)
                     for t in (a, e)]  # fmt: skip
        for g, h in zip(*gradients, strict=True):
            torch.testing.assert_close(g, h)


def test_the_reference_by_hand():
    """Of two keys, whose values are 1 and 0: p = 1 / (1 + exp(-x)), and its slope is p (1 - p)."""
    x, slope = 0.7, 2.5
    q = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[x], [0.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
    p = torch.sigmoid(torch.tensor(x, dtype=torch.float64))
    moved = torch.tensor([[[[slope], [0.0]]]], dtype=torch.float64)
    out, tangent, _ = reference.attention_jvp(q, k, v, None, moved, None)
    torch.testing.assert_close(out.squeeze(), p)
    torch.testing.assert_close(tangent.squeeze(), p * (1 - p) * slope)
    torch.testing.assert_close(reference.attention_jvp(q, k, v, None, None, moved)[1].squeeze(), p * slope)
