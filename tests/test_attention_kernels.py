"""attention_double_backward and attention_jvp as CUDA tensors have them, at heads of networks' sizes.

On the CPU that is blocks of matrix products, and with ROBUSTKERN_EMULATED the kernels of csrc/cuda/attention.cuh and
csrc/cuda/attention_jvp.cuh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from robustkern.ops._pytorch_derivatives import DERIVATIVES, Derivative
from robustkern.testing import assert_as_accurate_as_reference, cast
from tests.samples import make_tensor
from tests.samples.attention import forward

ENTRY, JVP = DERIVATIVES["attention_double_backward"], DERIVATIVES["attention_jvp"]


class Shape(NamedTuple):
    heads: int
    key_heads: int
    queries: int
    keys: int
    key_size: int
    value_size: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = [
    Shape(2, 2, 100, 100, 32, 32),
    Shape(2, 1, 130, 197, 64, 64),
    Shape(1, 1, 197, 65, 64, 40),
    Shape(1, 1, 64, 128, 96, 96),
    Shape(1, 1, 70, 90, 128, 128),
    Shape(1, 1, 33, 70, 72, 72),
    Shape(2, 2, 40, 64, 61, 17),
]


def on_cuda(*arguments: Any, entry: Derivative = ENTRY) -> tuple[Tensor, ...]:
    """What CUDA tensors have, also for CPU tensors."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return entry.operator.default.redispatch(cuda, *arguments)


def arguments_of(shape: Shape, dtype: torch.dtype, device: str, kind: str) -> dict[str, Any]:
    make = make_tensor(device, dtype)
    queries = (2, shape.heads, shape.queries)
    keys = (2, shape.key_heads, shape.keys)
    q, k, v = make(*queries, shape.key_size), make(*keys, shape.key_size), make(*keys, shape.value_size)
    causal, scale = "causal" in kind, shape.key_size**-0.5
    b = make(*keys, shape.key_size)
    if "far" in kind:  # T of all keys of a row is far from zero
        b = b + 4.0
    mask = None
    if "mask" in kind:
        mask = make(2, 1, shape.queries, shape.keys)
        mask[0, 0, 3] = -torch.inf
    saved = mask is None and "saved" in kind
    out, logsumexp = forward(q, k, v, causal, scale) if saved else (None, None)
    return {
        "a": make(*queries, shape.key_size),
        "b": b,
        "c": make(*keys, shape.value_size),
        "grad": make(*queries, shape.value_size),
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "logsumexp": logsumexp,
        "mask": mask,
        "causal": causal,
        "scale": scale,
    }


@pytest.mark.parametrize("kind", ["saved", "plain", "causal", "causal saved", "mask", "far saved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, kind, device):
    arguments = arguments_of(shape, dtype, device, kind)
    exact = ENTRY.reference(*cast(arguments).values())
    narrow = torch.float32 if dtype == torch.float64 else dtype
    eager = ENTRY.reference(*cast(arguments, narrow).values())
    actual = on_cuda(*arguments.values(), True, True, True, True)
    again = on_cuda(*arguments.values(), True, True, True, True)
    for name, a, n, r, e in zip(ENTRY.outputs, actual, again, eager, exact, strict=True):
        assert torch.equal(a, n)
        assert_as_accurate_as_reference(a, r.to(narrow), e, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_which_calls_the_kernels_serve(shape, dtype, device, emulated):
    """Rows of up to 256 bytes; what they write is what CUDA tensors have, so that the tests here are of kernels."""
    if not emulated:
        pytest.skip("the kernels are not here")
    fits = max(shape.key_size, shape.value_size) * dtype.itemsize <= 256
    inputs = tuple(arguments_of(shape, dtype, device, "saved").values())
    results = tuple(torch.empty_like(inputs[i]) for i in (3, 4, 5, 6))
    assert torch.ops.robustkern_cuda.attention_double_backward(*inputs, *results) == fits
    expected = on_cuda(*inputs, True, True, True, True)
    assert not fits or all(map(torch.equal, results, expected))

    inputs = tuple(jvp_arguments_of(shape, dtype, device, "plain").values())
    expected = on_cuda(*inputs, entry=JVP)
    results = tuple(map(torch.empty_like, expected))
    assert torch.ops.robustkern_cuda.attention_jvp(*inputs, *results) == fits
    assert not fits or all(map(torch.equal, results, expected))


@pytest.mark.parametrize("need", ["g", "q", "k", "v", "gk"])
def test_gradients_alone_are_the_same_bits(need, device):
    arguments = arguments_of(SHAPES[1], torch.bfloat16, device, "causal saved")
    everything = on_cuda(*arguments.values(), True, True, True, True)
    some = on_cuda(*arguments.values(), *(letter in need for letter in "gqkv"))
    for letter, one, whole in zip("gqkv", some, everything, strict=True):
        assert torch.equal(one, whole) if letter in need else one.shape == (0,)


def jvp_arguments_of(shape: Shape, dtype: torch.dtype, device: str, kind: str) -> dict[str, Any]:
    make = make_tensor(device, dtype)
    of_q = (2, shape.heads, shape.queries, shape.key_size)
    of_k = (2, shape.key_heads, shape.keys, shape.key_size)
    of_v = (2, shape.key_heads, shape.keys, shape.value_size)
    k_tangent = make(*of_k)
    if "far" in kind:
        k_tangent = k_tangent + 4.0
    mask = mask_tangent = None
    if "mask" in kind:
        mask = make(2, 1, shape.queries, shape.keys)
        mask[0, 0, 3] = -torch.inf
        mask_tangent = make(*mask.shape) if "moving" in kind else None
    return {
        "q": make(*of_q),
        "k": make(*of_k),
        "v": make(*of_v),
        "q_tangent": make(*of_q),
        "k_tangent": None if "context" in kind else k_tangent,
        "v_tangent": None if "context" in kind else make(*of_v),
        "mask": mask,
        "mask_tangent": mask_tangent,
        "causal": "causal" in kind,
        "scale": shape.key_size**-0.5,
    }


@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "moving mask", "far", "context"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_in_forward_mode(shape, dtype, kind, device):
    arguments = jvp_arguments_of(shape, dtype, device, kind)
    exact = JVP.reference(*cast(arguments).values())
    narrow = torch.float32 if dtype == torch.float64 else dtype
    eager = JVP.reference(*cast(arguments, narrow).values())
    actual = on_cuda(*arguments.values(), entry=JVP)
    again = on_cuda(*arguments.values(), entry=JVP)
    for name, a, n, r, e in zip(JVP.outputs, actual, again, eager, exact, strict=True):
        assert torch.equal(a, n)
        assert torch.equal(a == -torch.inf, e == -torch.inf)  # of rows that attend to nothing
        a, r, e = (t.masked_fill(t == -torch.inf, 0.0) for t in (a, r, e))
        assert_as_accurate_as_reference(a, r.to(torch.float32 if a.dtype == torch.float64 else a.dtype), e, what=name)
