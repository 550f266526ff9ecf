"""Clean and robust accuracy."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern._arguments import check_choice
from robustkern._choices import GRADIENTS_OF, GradientOf
from robustkern.attacks import attacked
from robustkern.data import Images, generator

from .distributed import Group

_BATCH = 250


class Attack(Protocol):
    """The call of an attack, as in `robustkern.attacks`."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


def clean_accuracy(
    model: nn.Module,
    data: Images,
    *,
    device: str = "cpu",
    on_batch: Callable[[], None] | None = None,
    group: Group | None = None,
) -> float:
    """Share of the images that the model classifies correctly in eval mode.

    Args:
        model: Maps images to logits.
        data: The images.
        device: Where the model is.
        on_batch: Called after each batch; what it raises ends the evaluation.
        group: Processes that share the work; the result does not depend on how many they are.

    >>> from robustkern.data import load
    >>> from robustkern.models import create
    >>> from robustkern.training import clean_accuracy
    >>> 0 <= clean_accuracy(create("small-cnn", 10, (1, 8, 8)), load("digits", split="test")) <= 1
    True
    """

    def right(batch: int, x: Tensor, y: Tensor) -> Tensor:
        with attacked(model), torch.no_grad():
            return model(x).argmax(dim=1) == y

    return _share(right, data, device, on_batch, group)


def robust_accuracy(
    model: nn.Module,
    data: Images,
    attack: Attack,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_batch: Callable[[], None] | None = None,
    group: Group | None = None,
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
        group: Processes that share the work; the result does not depend on how many they are.

    >>> from robustkern.attacks import FGSM
    >>> from robustkern.data import load
    >>> from robustkern.models import create
    >>> from robustkern.training import clean_accuracy, robust_accuracy
    >>> model, data = create("small-cnn", 10, (1, 8, 8)), load("digits", split="test")
    >>> robust_accuracy(model, data, FGSM(0.1)) <= clean_accuracy(model, data)
    True
    """

    def right(batch: int, x: Tensor, y: Tensor) -> Tensor:
        adversary = attack(model, x, y, generator=generator(seed, "attack", batch, device=device))
        with attacked(model), torch.no_grad():
            return (model(x).argmax(dim=1) == y) & (model(adversary).argmax(dim=1) == y)

    return _share(right, data, device, on_batch, group)


def device_of(model: nn.Module) -> torch.device:
    """The device that a model is on."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _share(
    right: Callable[[int, Tensor, Tensor], Tensor],
    data: Images,
    device: str,
    on_batch: Callable[[], None] | None,
    group: Group | None,
) -> float:
    """Share of the images for which `right` (number of the batch, x, y) is true."""
    rank, size = (group.rank, group.size) if group is not None else (0, 1)
    parts = torch.arange(len(data)).split(_BATCH) if len(data) else ()
    mine = data.parts(parts[rank::size])
    correct = 0
    for begin in range(0, len(parts), size):
        batch = begin + rank
        if batch < len(parts):
            x, y = next(mine)
            correct += int(right(batch, x.to(device), y.to(device)).sum())
        # A process without a batch calls it too: all of them may have to meet in it.
        if on_batch is not None:
            on_batch()
    if group is not None:
        correct = int(group.sum(float(correct)))
    return correct / max(1, len(data))


def input_gradients(model: nn.Module, x: Tensor, y: Tensor, of: GradientOf = "logit", batch_size: int = 250) -> Tensor:
    """d z_y / dx, d CE / dx or d (z_y - max_{j != y} z_j) / dx for each sample, in eval mode: [B, C, H, W].

    Figures show the logit's gradient: it does not fade where a network is certain, as that of the loss does.

    Args:
        model: Maps images to logits; left unchanged.
        x: Images.  [B, C, H, W]
        y: Their labels.  [B]
        of: "logit", "loss" or "margin".
        batch_size: Samples at a time.

    Raises:
        ValueError: An unknown `of`.

    >>> from robustkern.training import input_gradients
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> grads = input_gradients(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))
    >>> torch.equal(grads[1].flatten(), model[1].weight[2])
    True
    """
    check_choice("input_gradients", "of", of, GRADIENTS_OF)
    parts = []
    with attacked(model), torch.enable_grad():
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            leaf = xs.detach().clone().requires_grad_()
            logits = model(leaf)
            value = F.cross_entropy(logits, ys, reduction="none") if of == "loss" else logits.gather(1, ys[:, None])
            if of == "margin":
                value = value - logits.scatter(1, ys[:, None], -torch.inf).amax(1, keepdim=True)
            parts.append(torch.autograd.grad(value.sum(), leaf)[0])
    return torch.cat(parts) if parts else torch.zeros_like(x)
