"""Shapes, strides, dtypes and options that nobody thought of."""

import math
import os

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cases import assert_accurate, cotangents
from robustkern._dtypes import DTYPES
from robustkern.ops import row_norm, softmax_cross_entropy
from tests.samples import Sample

LARGEST = 40 if os.environ.get("ROBUSTKERN_EMULATED") else 700  # columns
# With few numbers, errors are a matter of luck, even the reference's; with many they can be compared.
BATCHES = st.integers(8, 16)


@st.composite
def layouts(draw, shape):
    """A function from a dense tensor to the same numbers with other strides and another offset."""
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.integers(1, 3))
    offset = draw(st.integers(0, 7))

    def lay_out(tensor):
        dense = tensor.permute(order)
        buffer = torch.full((offset + dense.numel() * step + 3,), math.nan, dtype=torch.float64).to(tensor)
        strides, stride = [], step
        for size in reversed(dense.shape):
            strides.insert(0, stride)
            stride *= max(size, 1)
        view = buffer.as_strided(dense.shape, strides, offset).permute(*torch.argsort(torch.tensor(order)).tolist())
        view.copy_(tensor)
        return view

    return lay_out


def values(draw, *shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * 10.0 ** draw(st.integers(-3, 3))


def check(sample, lay_out):
    grad, u = cotangents(sample)
    assert_accurate(sample, grad, lay_out(u))


@st.composite
def norm_samples(draw, device):
    batch, channels = draw(BATCHES), draw(st.integers(1, 4))
    inner = draw(st.lists(st.integers(3, 9), min_size=2, max_size=2))
    if draw(st.booleans()):
        channels, inner = draw(st.integers(10, LARGEST)), []
    shape = (batch, channels, *inner)
    dtype = draw(st.sampled_from(DTYPES))
    p = draw(st.one_of(st.sampled_from([1.0, 2.0, math.inf]), st.floats(1.25, 3.0)))
    lay_out = draw(layouts(shape))
    x = lay_out(values(draw, *shape).to(device, dtype))
    options = {"p": p, "squared": p == 2.0 and draw(st.booleans())}
    if draw(st.booleans()):
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        options["weight"] = (values(draw, channels).abs() + 0.1).to(device, accumulation)
    return Sample(row_norm, (x,), options, zero=("second",) if p in (1.0, math.inf) else ()), lay_out


@given(data=st.data())
def test_row_norm(data, device):
    sample, lay_out = data.draw(norm_samples(device))
    check(sample, lay_out)


@st.composite
def cross_entropy_samples(draw, device):
    shape = (draw(BATCHES), draw(st.one_of(st.integers(8, 16), st.integers(8, LARGEST))))
    dtype = draw(st.sampled_from(DTYPES))
    lay_out = draw(layouts(shape))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = lay_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
    if draw(st.booleans()):
        target = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    else:
        target = lay_out(torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype))
    smoothing = draw(st.one_of(st.just(0.0), st.floats(0.01, 0.9)))
    temperature = draw(st.one_of(st.just(1.0), st.floats(0.5, 5.0)))
    options = {"label_smoothing": smoothing, "temperature": temperature}
    if target.dtype == torch.long and draw(st.booleans()):
        options["ignore_index"] = int(target[0])
        assume(not (target == target[0]).all())  # a batch with nothing to learn from has nothing to compare
    return Sample(softmax_cross_entropy, (z, target), options), lay_out


@given(data=st.data())
def test_softmax_cross_entropy(data, device):
    sample, lay_out = data.draw(cross_entropy_samples(device))
    check(sample, lay_out)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 0), (0, 3, 2, 2), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_no_elements(shape, p, device):
    x = torch.empty(shape, device=device)
    weight = torch.ones(shape[1], device=device)
    for options in ({}, {"weight": weight}) if shape[1] else ({},):
        sample = Sample(row_norm, (x,), {"p": p, **options})
        grad, u = cotangents(sample)
        leaf = x.clone().requires_grad_()
        norm = sample(leaf, impl="kernel")
        assert norm.tolist() == [0.0] * shape[0]
        (grad_x,) = torch.autograd.grad(norm, leaf, grad.requires_grad_(), create_graph=True)
        assert grad_x.shape == shape
        (gg_grad,) = torch.autograd.grad(grad_x, grad, u)
        assert gg_grad.tolist() == [0.0] * shape[0]
