"""Networks that nobody here wrote train with a gradient penalty to the same losses before and after install()."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import robustkern

STEPS = 20
BATCH = 4


def preresnet():
    package = pytest.importorskip("pytorchcv.models.preresnet_cifar", reason="pip install robustkern[models]")
    return package.preresnet20_cifar10()


def vit():
    package = pytest.importorskip("x_transformers", reason="pip install robustkern[models]")
    layers = package.Encoder(dim=32, depth=2, heads=2, attn_flash=False)
    return package.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)


def losses(build, order, *, installed):
    """Total loss of each step; `order` is that of the samples in a batch, which changes nothing but the rounding."""
    torch.manual_seed(0)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    # BatchNorm mixes the samples, so each batch holds the same ones whatever their order.
    images, labels = torch.rand(STEPS, BATCH, 3, 32, 32)[:, order], torch.randint(10, (STEPS, BATCH))[:, order]
    history = []
    with robustkern.fused_double_backward() if installed else nullcontext():
        for x, y in zip(images, labels):
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(model(x), y)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            total = loss + BATCH * grad.square().sum()
            optimizer.zero_grad()
            total.backward(inputs=list(model.parameters()))
            optimizer.step()
            history.append(total.item())
    return torch.tensor(history)


@pytest.mark.parametrize("build", [preresnet, vit])
def test_the_same_losses(build, not_emulated):
    in_turn, reversed_order = torch.arange(BATCH), torch.arange(BATCH).flip(0)
    stock = losses(build, in_turn, installed=False)
    reordered = losses(build, reversed_order, installed=False)
    fused = losses(build, in_turn, installed=True)
    assert fused.isfinite().all()
    # Rounding grows from step to step: to what, a mere change of the order of summation tells.
    rounding = (reordered - stock).abs().cummax(0).values + torch.finfo(torch.float32).eps * stock.abs()
    excess = ((fused - stock).abs() / rounding).max()
    assert excess <= 10, f"losses differ by {excess:.3g} times what a reordered batch changes"
