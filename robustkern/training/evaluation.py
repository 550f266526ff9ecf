"""Clean and robust accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkern.attacks import PGD, attacked
from robustkern.data import Dataset, generator

_BATCH = 250


def clean_accuracy(
    model: nn.Module, data: Dataset, *, device: str = "cpu", on_batch: Callable[[], None] | None = None
) -> float:
    """Share of the images that the model classifies correctly in eval mode.

    Args:
        model: Maps images to logits.
        data: The images.
        device: Where the model is.
        on_batch: Called after each batch; what it raises ends the evaluation.
    """
    correct = 0
    with attacked(model), torch.no_grad():
        for x, y in _batches(data, device):
            correct += int((model(x).argmax(dim=1) == y).sum())
            if on_batch is not None:
                on_batch()
    return correct / max(1, len(data))


def robust_accuracy(
    model: nn.Module,
    data: Dataset,
    attack: PGD,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_batch: Callable[[], None] | None = None,
) -> float:
    """Share of the images that the model still classifies correctly when attacked.

    An image that is misclassified clean counts as misclassified, whatever the attack finds.

    Args:
        model: Maps images to logits.
        data: The images.
        attack: The attack.
        seed: Decides the random starts.
        device: Where the model is.
        on_batch: Called after each batch; what it raises ends the evaluation.
    """
    correct = 0
    for batch, (x, y) in enumerate(_batches(data, device)):
        starts = generator(seed, "attack", batch)
        if device != "cpu":
            starts = torch.Generator(device).manual_seed(starts.initial_seed())
        adversary = attack(model, x, y, generator=starts)
        with attacked(model), torch.no_grad():
            right = (model(x).argmax(dim=1) == y) & (model(adversary).argmax(dim=1) == y)
        correct += int(right.sum())
        if on_batch is not None:
            on_batch()
    return correct / max(1, len(data))


def input_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """d z_y / dx in eval mode: where more of a pixel speaks for the label.  [B, C, H, W]

    The logit rather than the loss, whose gradient fades to rounding errors where a network is certain.
    """
    x = x.detach().clone().requires_grad_(True)
    with attacked(model), torch.enable_grad():
        (grad,) = torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)
    return grad


def _batches(data: Dataset, device: str) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(data.images.split(_BATCH), data.labels.split(_BATCH), strict=True)
    return [(x.to(device), y.to(device)) for x, y in pairs]
