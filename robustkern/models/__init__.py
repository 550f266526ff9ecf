"""Models by name: `create("small-cnn", num_classes, in_shape, mean, std)`; also `timm:NAME`, `module:function`.

Every model takes images in [0, 1] and returns one [B, classes] tensor of logits; normalisation is its first layer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from . import named
from .normalize import Normalize
from .preact_resnet import PreActResNet
from .small_cnn import SmallCNN
from .smooth import SMOOTH, smooth_activations

__all__ = ["MODELS", "SMOOTH", "Normalize", "PreActResNet", "SmallCNN", "check_name", "create", "smooth_activations"]

# name -> (num_classes, in_shape, **options) -> network on normalised images
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "preact-resnet18": partial(PreActResNet, blocks=(2, 2, 2, 2)),
    "preact-resnet34": partial(PreActResNet, blocks=(3, 4, 6, 3)),
    "wide-resnet-28-10": partial(PreActResNet, blocks=(4, 4, 4), widths=(160, 320, 640), stem=16),
}


def check_name(name: str, options: Mapping[str, Any] | None = None) -> None:
    """ValueError unless a model can have this name and these keyword arguments; nothing is imported for it.

    >>> from robustkern.models import check_name
    >>> check_name("timm:convnext_atto", {"drop_path_rate": 0.1})
    """
    named.check_name(name, options or {}, MODELS)


def create(
    name: str,
    num_classes: int,
    in_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    smooth: str = "none",
    pretrained: bool = False,
) -> nn.Module:
    """A freshly initialised model; the initial weights come from PyTorch's global generator.

    Args:
        name: One of `MODELS`; `timm:NAME`; or `package.module:function`, which is imported, with modules of the working
            directory found, and called with `num_classes` and `in_shape`, each if it has such a parameter (a function
            with **keywords gets `num_classes`). It returns the network, which takes normalised images.
        num_classes: Number of logits.
        in_shape: Channels, height and width of an image.
        mean: Mean of each channel, zero by default.
        std: Standard deviation of each channel, one by default.
        options: More keyword arguments of the network.
        smooth: "gelu" or "silu" replaces every ReLU module; "none" leaves them.
        pretrained: Whether timm shall fetch the network's published weights, and fit a new head to the classes.

    Raises:
        ValueError: There is no such network, it refuses its arguments, or there is no ReLU module to replace.

    >>> from robustkern.models import create
    >>> create("small-cnn", 10, (1, 28, 28))(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_name(name, options)
    if smooth not in ("none", *SMOOTH):
        raise ValueError(f"smooth must be one of none, {', '.join(SMOOTH)}, got {smooth!r}")
    channels = in_shape[0]
    normalize = Normalize(mean or (0.0,) * channels, std or (1.0,) * channels)
    if len(normalize.mean) != channels:
        raise ValueError(f"{len(normalize.mean)} means for images of {channels} channels")
    if name not in MODELS:
        network = named.network(name, num_classes, in_shape, options or {}, pretrained)
    elif pretrained:
        raise ValueError(f"there are no pretrained weights of model {name}")
    else:
        try:
            network = MODELS[name](num_classes, in_shape, **(options or {}))
        except TypeError as error:
            raise ValueError(f"model {name}: {error}") from error
    model = nn.Sequential()
    model.add_module("normalize", normalize)
    model.add_module("network", network)
    if smooth != "none" and not smooth_activations(model, smooth):
        raise ValueError(f"model {name} has no ReLU module that {smooth} could replace")
    return model
