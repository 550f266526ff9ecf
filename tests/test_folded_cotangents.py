"""Several cotangents in one backward pass give the norms and gradients of separate passes, in every form and layout."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk
from robustkern.double_backward import folds
from robustkern.testing import assert_as_accurate_as_reference


class Block(nn.Module):
    """A ConvNeXt block: depthwise convolution, LayerNorm over the channels, two linear layers, a scale per channel."""

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


class ResidualBlock(nn.Module):
    """A block of a pre-activation ResNet: twice BatchNorm, ReLU and convolution, and a projection to half the size."""

    def __init__(self, channels, wide, training):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(wide)])
        self.first = nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, wide, 1, stride=2, bias=False)
        for norm in self.norms:
            norm.running_mean.fill_(0.02)
            norm.train(training)

    def forward(self, x):
        active = F.relu(self.norms[0](x))
        return self.second(F.relu(self.norms[1](self.first(active)))) + self.shortcut(active)


def resnet(training=True):
    blocks = [ResidualBlock(8, 12, training), ResidualBlock(12, 16, training)]
    norms = [nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *norms, *blocks, nn.Flatten(), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 6)
    )


class Attending(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width, causal):
        super().__init__()
        self.norm, self.causal = nn.LayerNorm(width), causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Patches(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flatten(2).transpose(1, 2)


def transformer(causal=False):
    blocks = [Attending(8, causal), Attending(8, causal)]
    return nn.Sequential(Patches(3, 8, 2, stride=2), *blocks, nn.GELU(), nn.Flatten(), nn.Linear(128, 6))


def batch(dtype=torch.float64, layout=torch.contiguous_format, device="cpu"):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(device=device, dtype=dtype, memory_format=layout).requires_grad_()


NETWORKS = {
    **{act: lambda act=act: convnext(act) for act in ACTIVATIONS},
    "resnet": resnet,
    "resnet, evaluated": lambda: resnet(False),
    "transformer": transformer,
    "transformer, causal": lambda: transformer(causal=True),
}


def build(dtype=torch.float64, layout=torch.contiguous_format, network="gelu"):
    torch.manual_seed(0)
    return NETWORKS[network]().to(dtype=dtype, memory_format=layout)


def results(model, x, *, fold, projections=4, stock=False, loss=True, **options):
    """Norms, and the gradients of their sum, plus those of a loss."""
    with sdpa_kernel(SDPBackend.MATH) if stock else rk.fused_double_backward():
        outputs = model(x)
        if not fold:
            outputs.grad_fn.register_hook(lambda *grads: None)  # a batched tensor must not reach it
        assert folds(outputs, x, 2) == fold
        generator = torch.Generator().manual_seed(3)
        norms = rk.jacobian_norm(outputs, x, projections, generator=generator, **options)
        total = norms.sum() + F.cross_entropy(outputs, torch.arange(len(x))) if loss else norms.sum()
        return norms, *torch.autograd.grad(total, [x, *model.parameters()], allow_unused=not loss)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_after_the_other(network, layout, not_emulated):
    model, x = build(network=network, layout=layout), batch(layout=layout)
    folded, looped = results(model, x, fold=True), results(model, x, fold=False)
    torch.testing.assert_close(folded, looped)
    torch.testing.assert_close(folded, results(model, x, fold=False, stock=True, impl="reference"))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_penalty_reaches_every_parameter(network, not_emulated):
    model, x = build(network=network), batch()
    # The gradients of constants that are added to the outputs, or to a normalisation's input, vanish; so do those of a
    # bias that only moves the kinks of ReLUs.
    without = [name for name, _ in model.named_parameters() if name.endswith("bias") and "resnet" in network]
    for name, grad in zip(["norms", "x", *dict(model.named_parameters())], results(model, x, fold=True, loss=False)):
        if name in ("7.1.bias", "5.bias"):  # of the outputs
            assert grad is None
        elif name not in without:
            assert grad.abs().max() > 0, name


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


@pytest.mark.parametrize("network", ["gelu", "resnet", "transformer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(network, dtype, not_emulated):
    model, x = build(dtype, network=network), batch(dtype)
    folded, looped = results(model, x, fold=True), results(model, x, fold=False)
    exact = copy.deepcopy(model).double()
    truth = results(exact, x.detach().double().requires_grad_(), fold=False)
    assert_as_accurate_as_reference(folded[0], looped[0], truth[0], what="norms")
    gradient, eager, exact = (torch.cat([grad.flatten() for grad in of[2:]]) for of in (folded, looped, truth))
    assert_as_accurate_as_reference(gradient, eager, exact, what="gradients of the parameters")


@pytest.mark.parametrize("network", ["gelu", "resnet", "resnet, evaluated", "transformer"])
def test_third_order(network, not_emulated):
    model, x = build(network=network), batch()
    parameters = [parameter for parameter in model.parameters() if parameter.dim() > 1]

    def curvature(fold):
        with rk.fused_double_backward():
            outputs = model(x)
            if not fold:
                outputs.grad_fn.register_hook(lambda *grads: None)
            assert folds(outputs, x, 2) == fold
            norms = rk.jacobian_norm(outputs, x, 3, generator=torch.Generator().manual_seed(3))
            (grad,) = torch.autograd.grad(norms.sum(), x, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), parameters)

    folded = curvature(True)
    torch.testing.assert_close(folded, curvature(False))
    assert all(grad.abs().max() > 0 for grad in folded)


@pytest.mark.parametrize("network", ["gelu", "transformer"])
def test_per_parameter_gradients_of_several_cotangents(network, not_emulated):
    """vmap over autograd.grad in the parameters: every cotangent has its own gradients."""
    model, x = build(network=network), batch()
    parameters = list(model.parameters())
    cotangents = torch.rand(3, 4, 6, dtype=torch.float64)

    def differentiate(outputs):
        return lambda cotangent: torch.autograd.grad(outputs, [x, *parameters], cotangent, retain_graph=True)

    with rk.fused_double_backward():
        several = torch.func.vmap(differentiate(model(x)))(cotangents)
    one = differentiate(model(x))
    for k, cotangent in enumerate(cotangents):
        torch.testing.assert_close([grad[k] for grad in several], list(one(cotangent)))


def test_what_does_not_fold():
    x, build_single = batch(torch.float32), lambda: build(torch.float32)
    assert not folds(build_single()(x), x, 2)
    with rk.fused_double_backward():
        outputs = build_single()(x)
        assert folds(outputs, x, 2)
        assert not folds(outputs, x, 1)
        assert not folds(outputs, torch.rand(4, 3, 8, 8, requires_grad=True), 2)
        assert not folds(nn.Sequential(build_single(), nn.Softplus())(x), x, 2)
        assert not folds(nn.Sequential(nn.GroupNorm(1, 3), build_single())(x), x, 2)
        assert not folds(outputs, x, 2, impl="reference")
        assert not folds(outputs, x.detach(), 2)
        assert not folds(x.detach(), x, 2)
        assert folds(nn.RMSNorm(8)(x), x, 2)
        assert folds(nn.BatchNorm2d(3)(x), x, 2)
        with torch.autograd.graph.save_on_cpu():
            assert not folds(build_single()(x), x, 2)
            assert not folds(nn.RMSNorm(8)(x), x, 2)
            assert not folds(nn.BatchNorm2d(3)(x), x, 2)
    assert not folds(outputs, x, 2)


def test_only_what_is_between_counts():
    """Hooks and operators that no pass from the outputs to x runs are no obstacle."""
    model, x = build(torch.float32, network="resnet"), batch(torch.float32)
    model[0].weight.register_hook(lambda grad: None)
    with rk.fused_double_backward():
        gate = F.softplus(model[-1].weight.sum()).expand(6)
        outputs = gate * model(x)
        assert folds(outputs, x, 2)
        assert not folds(F.softplus(outputs), x, 2)


def test_large_activations_are_not_folded_on_the_cpu():
    """A few cotangents of them would fill the cache."""
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    with rk.fused_double_backward():
        for layer, limit in ((nn.ReLU(), 4), (nn.BatchNorm2d(4096), 4), (nn.GELU(), 2)):
            wide = nn.Sequential(nn.Conv2d(3, 4096, 1), layer, nn.Flatten(), nn.Linear(4096 * 64, 2))  # 4 MiB
            outputs = wide(x)
            assert [folds(outputs, x, count) for count in range(2, 6)] == [count >= limit for count in range(2, 6)]


def test_hooks_see_one_gradient_after_the_other(not_emulated):
    model, x, seen = build(), batch(), []
    with rk.fused_double_backward():
        y = model[0](x)
        y.register_hook(seen.append)
        outputs = model[1:](y)
        assert not folds(outputs, x, 2)
        rk.jacobian_norm(outputs, x, 2).sum().backward()
    assert len(seen) == 3 and all(type(grad) is torch.Tensor and grad.shape == y.shape for grad in seen)


@pytest.mark.parametrize("network", ["gelu", "resnet", "transformer"])
@pytest.mark.parametrize("built_inside", [False, True])
def test_a_graph_of_one_scope_in_the_other(network, built_inside, not_emulated):
    """Whether robustkern is installed when a graph is built, or when it runs, changes no value."""
    model, x = build(network=network), batch()
    scopes = [rk.fused_double_backward, nullcontext][:: 1 if built_inside else -1]

    def gradients(build_scope, run_scope):
        with build_scope():
            outputs = model(x)
        with run_scope():
            norms = rk.jacobian_norm(outputs, x, 3, generator=torch.Generator().manual_seed(3))
        parameters = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        return norms, *torch.autograd.grad(norms.sum(), parameters)

    torch.testing.assert_close(gradients(*scopes), gradients(nullcontext, nullcontext))


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
    """The recomputation in the backward saves what the forward saved."""
    model, x = build(), batch()
    cotangents = torch.rand(3, 4, 6, dtype=torch.float64)
    ranges = {"convolution": (0, 1), "block": (1, 2), "norms": (5, 7), "linear": (7, 8), "all": (0, 8)}
    first, last = ranges[which]

    def gradients(checkpointed):
        with rk.fused_double_backward():
            y = model[:first](x)
            middle = model[first:last]
            y = torch.utils.checkpoint.checkpoint(middle, y, use_reentrant=False) if checkpointed else middle(y)
            outputs = model[last:](y)
            assert folds(outputs, x, 3) != checkpointed
            if vmapped:
                grad = torch.func.vmap(lambda v: torch.autograd.grad(outputs, x, v, create_graph=True)[0])(cotangents)
            else:
                grad = rk.jacobian_norm(outputs, x, 3, generator=torch.Generator().manual_seed(1))
            return torch.autograd.grad(grad.square().sum(), list(model.parameters())[:-1])

    plain = gradients(False)
    torch.testing.assert_close(gradients(True), plain)
    assert all(grad.abs().max() > 0 for grad in plain)
