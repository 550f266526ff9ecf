"""BatchNorm by cuDNN, as float32 networks on CUDA have it: here PyTorch's CPU kernels stand in for cuDNN's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustkern as rk
from robustkern import _library
from robustkern._graph import graph_nodes
from robustkern.double_backward import folds

pytestmark = pytest.mark.skipif(_library.aten_extension() is None, reason="needs robustkern._aten")
aten = torch.ops.aten
RESERVED = torch.arange(3, dtype=torch.uint8)


def forward(x, w, b, running_mean, running_var, training, momentum, eps):
    return *aten.native_batch_norm(x, w, b, running_mean, running_var, training, momentum, eps), RESERVED.clone()


def backward(x, g, w, running_mean, running_var, mean, invstd, eps, reserve):
    assert torch.equal(reserve, RESERVED) and g.is_contiguous(memory_format=torch.contiguous_format)
    reserve.zero_()  # as cuDNN may
    return aten.native_batch_norm_backward(g, x, w, None, None, mean, invstd, True, eps, [True] * 3)


@pytest.fixture(autouse=True)
def kernels():
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_batch_norm", forward, "CPU")
    library.impl("cudnn_batch_norm_backward", backward, "CPU")
    yield
    library._destroy()
    rk.uninstall()


class Norm(nn.BatchNorm2d):
    def forward(self, x):
        args = (self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps)
        return torch.cudnn_batch_norm(x, *args)[0]


def network(training=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), Norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), Norm(4), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, 5)).double().train(training)
    for layer in net:
        if isinstance(layer, Norm):
            layer.running_mean.fill_(0.1)
            layer.running_var.fill_(0.7)
    return net


def batch():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def names(tensor):
    return " ".join(node.name() for node in graph_nodes(tensor))


def test_it_folds():
    net, x = network(), batch()
    outputs = net(x)
    assert "CudnnBatchNormBackward0" in names(outputs) and not folds(outputs, x, 3)
    rk.install()
    outputs = net(x)
    assert "ForwardBatchNorm" in names(outputs) and "CudnnBatchNormBackward0" not in names(outputs)
    assert folds(outputs, x, 3)


@pytest.mark.parametrize("training", [True, False])
def test_several_cotangents_at_once(training):
    net, x = network(training), batch()
    v = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one_by_one = torch.stack([torch.autograd.grad(net(x), x, row)[0] for row in v])
    rk.install()
    outputs = net(x)
    assert folds(outputs, x, 3)
    together = torch.func.vmap(lambda row: torch.autograd.grad(outputs, x, row)[0])(v)
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("training", [True, False])
def test_first_derivatives_keep_their_bits(training):
    def gradients():
        net, x = network(training), batch()
        F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
        return [x.grad, *(p.grad for p in net.parameters()), *net.buffers()]

    expected = gradients()
    rk.install()
    found = gradients()
    for ours, stock in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours, stock)
    torch.testing.assert_close(found[0], expected[0])  # of a first layer, whose input gradient is a kernel of ours


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training):
    def gradients():
        net, x = network(training), batch()
        loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3]))
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(net.parameters()), materialize_grads=True)

    expected = gradients()
    rk.install()
    found = gradients()
    assert any(grad.abs().max() > 1e-6 for grad in expected)
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock)


def test_a_graph_can_be_run_twice():
    net, x = network(), batch()
    rk.install()
    outputs = net(x)
    first, second = (torch.autograd.grad(outputs.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
