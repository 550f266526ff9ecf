"""install(save_memory=True): less is kept, and every bit of every derivative is the same."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import robustkern as rk
from benchmarks.harness import peak_memory
from benchmarks.step_models import ConvNeXt, TransformerBlock
from robustkern import _library
from robustkern.models.preact_resnet import PreActResNet

pytestmark = pytest.mark.skipif(_library.aten_extension() is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def uninstalled_again():
    yield
    rk.uninstall()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, stride=4)
        self.blocks = nn.Sequential(TransformerBlock(32, 2), TransformerBlock(32, 2))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def convolutions(norm, activation):
    layers = []
    for channels in (3, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), norm(16), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 5))


NETWORKS = {
    "residual": lambda: PreActResNet(5, (3, 16, 16), (1, 1), (8, 16)),
    "ConvNeXt": lambda: ConvNeXt((3, 16, 16), channels=16, depth=2),
    "attention": Tokens,
    "BatchNorm, ReLU in place": lambda: convolutions(nn.BatchNorm2d, lambda: nn.ReLU(inplace=True)),
    "GroupNorm, SiLU": lambda: convolutions(lambda c: nn.GroupNorm(4, c), nn.SiLU),
    "BatchNorm, GELU": lambda: convolutions(nn.BatchNorm2d, lambda: nn.GELU("tanh")),
    "no norm, ReLU": lambda: convolutions(lambda c: nn.Identity(), nn.ReLU),
}
over_networks = pytest.mark.parametrize("name", NETWORKS)


def made(name, device, channels_last=False):
    torch.manual_seed(3)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = NETWORKS[name]().to(device, memory_format=layout)
    x = torch.rand(8, 3, 16, 16).to(device, memory_format=layout).requires_grad_()
    return model, x, torch.arange(8, device=device) % 5


def derivatives(model, x, y, order=2):
    """Of the loss and the squares of its derivatives in x, up to an order, in the parameters and x."""
    value = F.cross_entropy(model(x), y, reduction="sum")
    total = value
    for _ in range(order - 1):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.square().sum()
        total = total + value
    return torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)


def both(run):
    """The result of `run`, installed without and with save_memory."""
    results = []
    for less in (False, True):
        rk.install(save_memory=less)
        results.append(run())
        rk.uninstall()
    return results


def assert_same(results):
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@over_networks
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_same_bits(name, channels_last, order, device):
    model, x, y = made(name, device, channels_last)
    assert_same(both(lambda: derivatives(model, x, y, order)))


@over_networks
@pytest.mark.parametrize("mode", ["eval", "bfloat16"])
def test_the_same_bits_in_eval_mode_and_under_autocast(name, mode, device):
    model, x, y = made(name, device)
    model.train(mode != "eval")

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=mode == "bfloat16"):
            return derivatives(model, x, y)

    assert_same(both(run))


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("residual", 0.8),
        ("ConvNeXt", 0.75),
        ("attention", 0.8),
        ("BatchNorm, ReLU in place", 0.8),
        ("GroupNorm, SiLU", 0.8),
    ],
)
def test_less_is_held(name, share, device):
    model, x, y = made(name, device)
    without, less = both(lambda: peak_memory(lambda: derivatives(model, x, y), device))
    assert less < share * without


@over_networks
def test_several_cotangents(name, device):
    model, x, _ = made(name, device)

    def run():
        logits = model(x)
        cotangents = torch.eye(logits.shape[1], device=device)[:3, None].expand(3, *logits.shape)
        (rows,) = torch.autograd.grad(logits, x, cotangents, is_grads_batched=True, create_graph=True)
        return [rows, *torch.autograd.grad(rows.square().sum(), list(model.parameters()), allow_unused=True)]

    assert_same(both(run))


def test_beside_checkpoints(device):
    """In a checkpoint PyTorch's rule holds, around it ours."""
    model, x, y = made("attention", device)

    def run():
        features = checkpoint(model.blocks[0], model.embed(x).flatten(2).transpose(1, 2), use_reentrant=False)
        loss = F.cross_entropy(model.head(model.blocks[1](features).mean(1)), y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + grad.square().sum(), list(model.parameters()))

    assert_same(both(run))


def test_hooks_of_others_are_left_alone(device):
    model, x, y = made("residual", device)
    rk.install(save_memory=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        derivatives(model, x, y)
    assert torch.Size([8, 8, 16, 16]) in packed
    assert torch.func.grad(lambda v: F.cross_entropy(model.eval()(v), y))(x).shape == x.shape


def test_what_was_overwritten_is_noticed(device):
    layer = nn.Conv2d(3, 4, 3).to(device)
    x = torch.rand(2, 3, 8, 8, device=device, requires_grad=True)
    rk.install(save_memory=True)
    image = x * 2
    value = layer(image).square().sum()
    image.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_graph_runs_as_often_as_it_is_retained_and_then_is_gone(device):
    model, x, y = made("residual", device)
    rk.install(save_memory=True)
    loss = F.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    total, parameters = loss + grad.square().sum(), list(model.parameters())
    assert_same([torch.autograd.grad(total, parameters, retain_graph=True) for _ in range(2)])
    torch.autograd.grad(total, parameters)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(total, parameters)


def test_no_part_of_a_graph_lives_on(device):
    model, x, y = made("residual", device)
    rk.install(save_memory=True)
    kept = []
    handles = [
        m.register_forward_hook(lambda *a: kept.append(StorageWeakRef(a[2].untyped_storage()))) for m in model.modules()
    ]
    loss = F.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(grad.square().sum(), list(model.parameters()), retain_graph=True)
    gc.disable()
    try:
        assert not all(storage.expired() for storage in kept)
        del loss, grad
        assert all(storage.expired() for storage in kept)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


def test_a_scope_around_a_loss(device):
    model, x, y = made("ConvNeXt", device)
    loss, parameters = rk.losses.GradientPenalty(), list(model.parameters())

    def peak(save_memory):
        def step():
            with rk.fused_double_backward(save_memory=save_memory):
                terms = loss(model, x.detach(), y)
            torch.autograd.grad(terms.total, parameters)

        return peak_memory(step, device)

    assert peak(True) < 0.8 * peak(False)


def test_compiled_steps_are_as_without(device):
    model, x, y = made("BatchNorm, GELU", device)
    model.eval()
    rk.install(save_memory=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(derivatives, backend="eager", fullgraph=True)(model, x, y)
    torch.testing.assert_close(compiled, derivatives(model, x, y))


def test_a_weight_that_is_cheap_to_make(device):
    """It is read where only the gradient of the other factor is asked for."""
    torch.manual_seed(3)
    weight, x = torch.rand(64, 64, device=device, requires_grad=True), torch.rand(64, 64, device=device)
    x.requires_grad_()

    def run():
        value = x @ F.layer_norm(weight, (64,)) + F.gelu(x) @ F.gelu(x)
        return torch.autograd.grad(value.square().sum(), x)

    assert_same(both(run))
