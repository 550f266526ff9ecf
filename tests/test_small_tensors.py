"""Where PyTorch's own derivatives are as fast, a graph is PyTorch's; elsewhere it is ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustkern as rk
from robustkern import _library
from robustkern._graph import graph_nodes
from tests.test_installed import assert_close, fresh, normal_like, over_cases


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    before = _library.aten_extension().however_small(False)
    rk.install()
    yield
    rk.uninstall()
    _library.aten_extension().however_small(before)


def names(t: Tensor) -> list[str]:
    return [node.name() for node in graph_nodes(t)]


def ours(t: Tensor) -> list[str]:
    return [name for name in names(t) if "rk::aten" in name]


@over_cases
def test_small_forwards_are_pytorchs(case, device):
    """A plain step on small tensors is PyTorch's from end to end, except for GroupNorm with channels innermost."""
    if device == "cpu" and not case.crashes:
        assert not ours(case.function(*fresh(case, device)))


@over_cases
def test_small_second_derivatives_are_right(case, device):
    inputs = fresh(case, device)

    def second(function: Any) -> list[Tensor]:
        grads = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        mixed = sum((normal_like(g, i) * g).sum() for i, g in enumerate(grads))
        return list(torch.autograd.grad(mixed, inputs, materialize_grads=True))

    actual = second(case.function)
    rk.uninstall()
    assert_close(actual, second(case.stock or case.function))


SIZED = {
    "tanh": (torch.tanh, 1 << 15),
    "sigmoid": (torch.sigmoid, 1 << 16),
    "softplus": (F.softplus, 1 << 14),
    "elu": (F.elu, 1 << 13),
    "hardswish": (F.hardswish, 1 << 14),
    "silu": (F.silu, 1 << 14),
    "mish": (F.mish, 1 << 14),
    "relu": (F.relu, 1 << 14),
    "max_pool": (lambda x: F.max_pool1d(x[None], 2), 1 << 14),
    "softmax": (lambda x: F.softmax(x, -1), 1 << 15),
    "log_softmax": (lambda x: F.log_softmax(x, -1), 1 << 14),
    "rms_norm": (lambda x: F.rms_norm(x, (64,)), 1 << 12),
    "group_norm": (lambda x: F.group_norm(x, 4), 1 << 14),
}


@pytest.mark.parametrize("name", SIZED)
def test_fused_from_a_size_on(name):
    function, size = SIZED[name]
    for rows, fused in ((size // 64 - 1, False), (size // 64, True)):
        x = torch.randn(rows, 64).requires_grad_()
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        assert bool(ours(grad)) == fused


def test_hardsigmoid_has_a_second_derivative_at_every_size():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(F.hardsigmoid(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    (slope,) = torch.autograd.grad(F.hardsigmoid(x).sum(), x)
    assert_close([second], [2 * slope.square()])
    assert second.any()


@pytest.mark.parametrize(
    "kernel, layout, image, fused",
    [
        (3, torch.contiguous_format, 32, True),
        (7, torch.contiguous_format, 28, True),
        (11, torch.contiguous_format, 32, False),
        (11, torch.channels_last, 32, True),
        (15, torch.channels_last, 32, False),
    ],
)
def test_large_depthwise_kernels_are_pytorchs(kernel, layout, image, fused):
    network = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8).to(memory_format=layout)
    x = torch.randn(2, 8, image, image).contiguous(memory_format=layout).requires_grad_()
    (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    assert any("ConvolutionBackward" in name for name in ours(grad)) == fused
