"""Several cotangents in one backward pass: the norms and gradients of one after the other, in every form and layout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustkern as rk
from robustkern.double_backward import folds
from robustkern.testing import assert_as_accurate_as_reference

pytestmark = pytest.mark.usefixtures("fused")


@pytest.fixture
def fused():
    with rk.fused_double_backward():
        yield


class Block(nn.Module):
    """ConvNeXt's: depthwise convolution, LayerNorm over the channels, two linear layers, a scale for each channel."""

    def __init__(self, channels, act):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.act = nn.LayerNorm(channels), act
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels, bias=False)
        self.scale = nn.Parameter(torch.full((channels,), 0.7))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x - (self.scale * self.narrow(self.act(self.wide(y)))).permute(0, 3, 1, 2)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
}


def convnext(act="gelu"):
    make = ACTIVATIONS[act]
    stem = [nn.Conv2d(3, 8, 2, stride=2), Block(8, make()), make(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*stem, nn.Flatten(2), nn.RMSNorm(16), nn.LayerNorm(16, elementwise_affine=False)).append(
        nn.Sequential(nn.Flatten(), nn.Linear(128, 6))
    )


def batch(dtype=torch.float64, layout=torch.contiguous_format, device="cpu"):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(device=device, dtype=dtype, memory_format=layout).requires_grad_()


def build(dtype=torch.float64, layout=torch.contiguous_format, act="gelu"):
    torch.manual_seed(0)
    return convnext(act).to(dtype=dtype, memory_format=layout)


def results(model, x, *, fold, projections=4, **options):
    """Norms, and the gradients of a loss and their sum."""
    outputs = model(x)
    if not fold:
        outputs.grad_fn.register_hook(lambda *grads: None)  # which a batched tensor must not reach
    assert folds(outputs) == fold
    generator = torch.Generator().manual_seed(3)
    norms = rk.jacobian_norm(outputs, x, projections, generator=generator, **options)
    loss = norms.sum() + F.cross_entropy(outputs, torch.arange(len(x)))
    return norms, *torch.autograd.grad(loss, [x, *model.parameters()])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_after_the_other(act, layout, not_emulated):
    model, x = build(act=act, layout=layout), batch(layout=layout)
    folded, looped = results(model, x, fold=True), results(model, x, fold=False)
    torch.testing.assert_close(folded, looped)
    with rk.fused_double_backward():
        stock = results(model, x, fold=False, impl="reference")
    torch.testing.assert_close(folded, stock)
    assert folded[0].min() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"projections": "exact"},
        {"projections": "exact", "kind": "fisher"},
        {"projections": 6, "kind": "centred"},
        {"projections": 1},
        {"projections": 2, "law": "gaussian", "squared": False},
        {"projections": 3, "weight": torch.tensor([0.5, 2.0, 1.0])},
        {"projections": 3, "reduction": "mean", "first": 5},
    ],
    ids=str,
)
def test_options(options, not_emulated):
    model, x = build(), batch()
    torch.testing.assert_close(results(model, x, fold=True, **options), results(model, x, fold=False, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, not_emulated):
    model, x = build(dtype), batch(dtype)
    folded, looped = results(model, x, fold=True), results(model, x, fold=False)
    exact = copy.deepcopy(model).double()
    truth = results(exact, x.detach().double().requires_grad_(), fold=False)
    assert_as_accurate_as_reference(folded[0], looped[0], truth[0])
    assert_as_accurate_as_reference(folded[3], looped[3], truth[3])


def test_third_order(not_emulated):
    model, x = build(), batch()

    def curvature(fold):
        outputs = model(x)
        if not fold:
            outputs.grad_fn.register_hook(lambda *grads: None)
        norms = rk.jacobian_norm(outputs, x, 3, generator=torch.Generator().manual_seed(3))
        (grad,) = torch.autograd.grad(norms.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True)

    for folded, looped in zip(curvature(True), curvature(False)):
        torch.testing.assert_close(folded, looped)


def test_per_parameter_gradients_of_several_cotangents(not_emulated):
    """vmap over autograd.grad in the parameters, of which every cotangent has its own gradients."""
    model, x = build(), batch()
    parameters = list(model.parameters())
    cotangents = torch.rand(3, 4, 6, dtype=torch.float64)
    outputs = model(x)

    def gradients(cotangent):
        return torch.autograd.grad(outputs, [x, *parameters], cotangent, retain_graph=True)

    several = torch.func.vmap(gradients)(cotangents)
    for k, cotangent in enumerate(cotangents):
        torch.testing.assert_close([grad[k] for grad in several], list(gradients(cotangent)))


def test_what_does_not_fold():
    x = batch(torch.float32)
    seen = []

    def hooked(model):
        y = model[0](x)
        y.register_hook(seen.append)
        return model[1:](y)

    assert folds(build(torch.float32)(x))
    assert not folds(hooked(build(torch.float32)))
    assert not folds(nn.Sequential(build(torch.float32), nn.ReLU())(x))
    assert not folds(nn.Sequential(nn.BatchNorm2d(3), build(torch.float32))(x))
    assert not folds(build(torch.float32)(x), impl="reference")
    assert not folds(x.detach())
    with torch.autograd.graph.save_on_cpu():
        assert not folds(build(torch.float32)(x))
        assert not folds(nn.RMSNorm(8)(x))
    assert folds(nn.RMSNorm(8)(x))
    outputs = hooked(build(torch.float32))
    rk.jacobian_norm(outputs, x, 2).sum().backward()
    assert len(seen) == 3 and all(type(grad) is torch.Tensor and grad.shape == (4, 8, 4, 4) for grad in seen)


def test_uninstalled_graph_does_not_fold():
    model, x = build(torch.float32), batch(torch.float32)
    outputs = model(x)
    assert folds(outputs)
    generator = torch.Generator().manual_seed(3)
    inside = rk.jacobian_norm(outputs, x, 2, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustkern.jacobian.folds", lambda outputs, impl: False)
        generator.manual_seed(3)
        torch.testing.assert_close(rk.jacobian_norm(outputs, x, 2, generator=generator), inside)


@pytest.mark.parametrize(
    "which, vmapped",
    [
        ("convolution", False),
        ("convolution", True),
        ("block", False),  # under vmap PyTorch's own linear layer saves its matrices in another order
        ("norms", False),
        ("norms", True),
        ("linear", False),
        ("all", False),
    ],
)
def test_checkpointing(which, vmapped, not_emulated):
    """What is computed again in the backward saves what was saved in the forward."""
    model, x = build(), batch()
    cotangents = torch.rand(3, 4, 6, dtype=torch.float64)
    ranges = {"convolution": (0, 1), "block": (1, 2), "norms": (5, 7), "linear": (7, 8), "all": (0, 8)}
    first, last = ranges[which]

    def gradients(checkpointed):
        y = model[:first](x)
        middle = model[first:last]
        y = torch.utils.checkpoint.checkpoint(middle, y, use_reentrant=False) if checkpointed else middle(y)
        outputs = model[last:](y)
        assert folds(outputs) != checkpointed
        if vmapped:
            grad = torch.func.vmap(lambda v: torch.autograd.grad(outputs, x, v, create_graph=True)[0])(cotangents)
        else:
            grad = rk.jacobian_norm(outputs, x, 3, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True)

    torch.testing.assert_close(gradients(True), gradients(False))
