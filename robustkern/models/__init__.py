"""Models by name: `create("small-cnn", num_classes, in_shape, mean, std)`.

Every model takes images in [0, 1] and returns one [B, classes] tensor of logits; normalisation is its first layer.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from .normalize import Normalize
from .preact_resnet import PreActResNet
from .small_cnn import SmallCNN

__all__ = ["MODELS", "Normalize", "PreActResNet", "SmallCNN", "create"]

# name -> (num_classes, in_shape) -> network on normalised images
MODELS: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {
    "small-cnn": SmallCNN,
    "preact-resnet18": partial(PreActResNet, blocks=(2, 2, 2, 2)),
    "preact-resnet34": partial(PreActResNet, blocks=(3, 4, 6, 3)),
    "wide-resnet-28-10": partial(PreActResNet, blocks=(4, 4, 4), widths=(160, 320, 640), stem=16),
}


def create(
    name: str,
    num_classes: int,
    in_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A freshly initialised model; the initial weights come from PyTorch's global generator.

    Args:
        name: One of `MODELS`.
        num_classes: Number of logits.
        in_shape: Channels, height and width of an image.
        mean: Mean of each channel, zero by default.
        std: Standard deviation of each channel, one by default.

    >>> from robustkern.models import create
    >>> create("small-cnn", 10, (1, 28, 28))(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: choose one of {', '.join(MODELS)}")
    channels = in_shape[0]
    normalize = Normalize(mean or (0.0,) * channels, std or (1.0,) * channels)
    if len(normalize.mean) != channels:
        raise ValueError(f"{len(normalize.mean)} means for images of {channels} channels")
    model = nn.Sequential()
    model.add_module("normalize", normalize)
    model.add_module("network", MODELS[name](num_classes, in_shape))
    return model
