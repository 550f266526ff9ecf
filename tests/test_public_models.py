"""Networks from other packages train with a gradient penalty to the same losses before and after install()."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import robustkern

STEPS = 20
BATCH = 4
IN_TURN, REVERSED = torch.arange(BATCH), torch.arange(BATCH).flip(0)


def preresnet():
    package = pytest.importorskip("pytorchcv.models.preresnet_cifar", reason="pip install -e '.[models]'")
    return package.preresnet20_cifar10()


def vit():
    package = pytest.importorskip("x_transformers", reason="pip install -e '.[models]'")
    layers = package.Encoder(dim=32, depth=2, heads=2, attn_flash=False)
    return package.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)


def data(order, dtype):
    """Images and labels of every step; `order` is that of the samples in a batch, which changes only rounding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(STEPS, BATCH, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(10, (STEPS, BATCH), generator=generator)
    # BatchNorm mixes the samples, so each batch holds the same ones whatever their order.
    return images[:, order], labels[:, order]


def start(build, dtype):
    torch.manual_seed(0)
    model = build().train().to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def penalised_gradient(model, x, y, *, installed):
    """Leaves the gradient of the penalised loss in the parameters; returns the loss."""
    with robustkern.fused_double_backward() if installed else nullcontext():
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(model(x), y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        total = loss + BATCH * grad.square().sum()
        model.zero_grad()
        total.backward(inputs=list(model.parameters()))
    return total.detach()


def losses(build, *, installed):
    model, optimizer = start(build, torch.float64)
    history = []
    for x, y in zip(*data(IN_TURN, torch.float64)):
        history.append(penalised_gradient(model, x, y, installed=installed))
        optimizer.step()
    return torch.stack(history)


@pytest.mark.parametrize("build", [preresnet, vit])
def test_the_same_losses(build, not_emulated):
    # In float64: in float32, a ReLU whose input is zero up to rounding makes any two runs diverge, even two of stock
    # PyTorch with the samples in another order. The remaining difference is far below float32's rounding.
    stock, fused = losses(build, installed=False), losses(build, installed=True)
    torch.testing.assert_close(fused.float(), stock.float())


@pytest.mark.parametrize("build", [preresnet, vit])
def test_the_same_gradient_at_every_step(build, not_emulated):
    """In float32, at each point that stock PyTorch's training passes: losses equal, gradients to a reordered sum's."""
    model, optimizer = start(build, torch.float32)
    fused_difference, reordered_difference = [], []

    def compute(x, y, *, installed):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        total = penalised_gradient(model, x, y, installed=installed)
        model.load_state_dict(buffers, strict=False)  # BatchNorm's running statistics go one step on, not three
        return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    for x, y, *reordered_batch in zip(*data(IN_TURN, torch.float32), *data(REVERSED, torch.float32)):
        fused_total, fused = compute(x, y, installed=True)
        _, reordered = compute(*reordered_batch, installed=False)
        total = penalised_gradient(model, x, y, installed=False)
        stock = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.testing.assert_close(fused_total, total)
        fused_difference.append((fused - stock).norm() / stock.norm())
        reordered_difference.append((reordered - stock).norm() / stock.norm())
        optimizer.step()
    # The median, because a reordered batch sometimes flips the signs of a few ReLUs and then differs by far more.
    excess = torch.stack(fused_difference).max() / torch.stack(reordered_difference).median()
    assert excess <= 2, f"gradients differ by {excess:.3g} times what a reordered batch changes"
