"""robustkern.install() under torch.compile: one graph, the same gradients, nothing taken from stock's cache."""

import pytest
import torch
from torch import nn

import robustkern
from robustkern.testing import assert_as_accurate_as_reference


def gradients(model, x):
    loss = model(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(loss + grad.square().sum(), tuple(model.parameters()))


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: nn.BatchNorm2d(3)])
def test_a_penalised_step_is_one_graph(layer):
    model = nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.rand(2, 3, 5, 5, requires_grad=True)
    model(x)
    stock = gradients(model, x)
    exact = gradients(model.double(), x.detach().double().requires_grad_())
    model.float()
    with robustkern.fused_double_backward(), torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(gradients, backend="eager", fullgraph=True)(model, x)
    for actual, rounded, truth in zip(compiled, stock, exact, strict=True):
        assert_as_accurate_as_reference(actual, rounded, truth, what="gradient")


def test_compiled_code_is_cached_apart():
    tag = torch.compiler.config.cache_key_tag
    robustkern.install(materialize_zeros=True)
    try:
        zeros = torch.compiler.config.cache_key_tag
        robustkern.install()
        installed = torch.compiler.config.cache_key_tag
        with robustkern.fused_double_backward():
            assert torch.compiler.config.cache_key_tag == installed
    finally:
        robustkern.uninstall()
    assert len({tag, installed, zeros}) == 3
    assert torch.compiler.config.cache_key_tag == tag
