"""Inversion: images made by following a classifier's input gradient towards a class, and what others see in them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern import ops
from robustkern._arguments import check_choice
from robustkern._choices import THREATS, Threat
from robustkern.attacks import attacked


def invert(
    model: nn.Module,
    start: Tensor,
    target: Tensor,
    *,
    steps: int = 16,
    step_size: float | Tensor = 0.1,
    norm: Threat = "linf",
    batch_size: int = 500,
) -> Tensor:
    r"""x_{t+1} = clamp(x_t - step_size d(grad_x CE(f(x_t), target)), 0, 1), d = sign (linf) or g / ||g||_2 (l2).

    No ball limits the search: what the classifier takes for its class may be anywhere.  No parameter gradients.
    Source: Helland and VanHoudnos, On the human-recognizability phenomenon of adversarially trained deep image
    classifiers, 2020; there 16 steps of 0.1 from test images, and 1,024 of 2/255 from noise, in units of the standard
    deviation of each channel.

    Args:
        model: Maps images to logits; left unchanged.
        start: Images in [0, 1].  [B, C, H, W]
        target: The class that each is to become.  [B]
        steps: Steps.
        step_size: Length of a step, in units of the image; for linf also a tensor that broadcasts over an image, such
            as 0.1 times the standard deviations, [C, 1, 1].
        norm: "linf" or "l2".
        batch_size: Images at a time.

    Returns:
        Images in [0, 1].  [B, C, H, W]

    Raises:
        ValueError: An unknown norm, or steps < 1.

    >>> from robustkern.study import invert
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> invert(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), steps=3).shape
    torch.Size([2, 1, 4, 4])
    """
    check_choice("invert", "norm", norm, THREATS)
    if steps < 1:
        raise ValueError(f"invert: steps must be at least 1, got {steps}")
    # attack_step stays in a ball; one that reaches from any point of the box to any other limits nothing.
    everywhere = 1.0 if norm == "linf" else float(start[:1].numel()) ** 0.5
    parts = []
    with attacked(model), torch.enable_grad():
        for begin, wanted in zip(start.detach().split(batch_size), target.split(batch_size), strict=True):
            image = begin.clone()
            for _ in range(steps):
                leaf = image.detach().requires_grad_()
                gain = -F.cross_entropy(model(leaf), wanted, reduction="sum")
                (grad,) = torch.autograd.grad(gain, leaf)
                ops.attack_step(image, begin, grad, eps=everywhere, step_size=step_size, norm=norm)
            parts.append(image)
    return torch.cat(parts) if parts else start.clone()


def seeded_grid(x: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Every image with every class as its target, image by image: starts [B * classes, C, H, W], targets [B * classes].

    Args:
        x: Images, one of each class in the published figure.  [B, C, H, W]
        classes: Number of classes.

    >>> from robustkern.study import seeded_grid
    >>> starts, targets = seeded_grid(torch.rand(2, 1, 4, 4), 3)
    >>> len(starts), targets.tolist()
    (6, [0, 1, 2, 0, 1, 2])
    """
    targets = torch.arange(classes, device=x.device).repeat(len(x))
    return x.repeat_interleave(classes, dim=0), targets


def noise(count: int, shape: tuple[int, int, int], *, seed: int = 0, spread: float = 0.25) -> Tensor:
    """0.5 + spread U(-1, 1), clamped to [0, 1]: where inversions from nothing start.  [count, C, H, W]

    Args:
        count: Number of images.
        shape: Channels, height and width.
        seed: Decides them.
        spread: Half the width of the distribution; the published one is a standard deviation of the data.

    >>> from robustkern.study import noise
    >>> noise(2, (1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + spread * (2 * torch.rand(count, *shape, generator=generator) - 1)).clamp_(0, 1)


def inversion_accuracy(judge: nn.Module, inverted: Tensor, target: Tensor, batch_size: int = 500) -> Tensor:
    """Whether another classifier names the target of each inverted image: [B] of 0 and 1.

    Args:
        judge: A classifier that was trained by itself, with another seed, preferably another architecture: what a
            network sees in its own inversions says nothing.
        inverted: Images.  [B, C, H, W]
        target: The classes they were made for.  [B]
        batch_size: Images at a time.

    >>> from robustkern.study import inversion_accuracy
    >>> inversion_accuracy(nn.Flatten(), torch.eye(2).view(2, 2, 1, 1), torch.tensor([0, 0])).tolist()
    [1.0, 0.0]
    """
    with attacked(judge), torch.no_grad():
        named = [judge(part).argmax(1) for part in inverted.split(batch_size)]
    return (torch.cat(named) == target).float() if named else torch.zeros(0)
