"""What each data set is trained with when the user does not say otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .config import TrainingConfig
from .initial import PRETRAINED
from .methods import METHODS

# Radii at which the images keep their meaning for a person: digits of 8x8 pixels in 17 grey levels and clothes in 28x28
# keep it at larger radii than photographs do.
_RECIPES: dict[str, dict[str, Any]] = {
    # One thread: the steps are so short that a second one costs more than it brings.
    "digits": {"eps": 0.15, "epochs": 40, "lr": 0.1, "threads": 1},
    "digits-28": {"eps": 0.15, "epochs": 30, "lr": 0.1, "threads": 1},
    "mnist": {"eps": 0.2, "epochs": 10, "lr": 0.1},
    "fashion-mnist": {"eps": 0.1, "epochs": 8, "lr": 0.1},
    "cifar10": {"eps": 8 / 255, "epochs": 30, "lr": 0.1, "model": "preact-resnet18"},
}

# For the methods that have the option. Label smoothing keeps the loss from vanishing at the training images: if it
# vanished, so would its gradient, and a penalty on that gradient would have nothing left to act on. The few digits,
# which are soon learnt by heart, need more of both than the larger sets.
_SMOOTHING = {"digits": 0.2, "digits-28": 0.1, "mnist": 0.1, "fashion-mnist": 0.1}

# Options of one method. Attacks of seven steps are those of the study's paper; the digits' weights were tried out.
_SEVEN_STEPS: dict[str, dict[str, Any]] = {name: {"steps": 7} for name in ("pgd", "trades", "mart", "alp")}
_DIGITS: dict[str, dict[str, Any]] = {
    "gradient-penalty": {"weight": 4.0},
    "jacobian": {"weight": 10.0},
    "fisher": {"weight": 100.0},
    "cross-lipschitz": {"weight": 30.0},
    **_SEVEN_STEPS,
}
_BY_METHOD: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(_RECIPES, _SEVEN_STEPS),
    **dict.fromkeys(("digits", "digits-28"), _DIGITS),
}

# Trained at the adversary alone, as published.  A weight that grew from 0 would mix both losses on the way, and pay for
# the gradient of the one at the clean image as well.  No smooth labels: nothing needs the loss not to vanish here.
_AT_THE_ADVERSARY = ("fgsm", "n-fgsm", "pgd")
_HARD_LABELS = (*_AT_THE_ADVERSARY, "standard")


# Gradients are divided by the temperature, and a larger learning rate makes up for it. Published: 0.4 instead of 0.2.
_DISTILLATION_LR = 0.4


def teacher_recipe(data: str, **given: Any) -> TrainingConfig:
    """The configuration of a network that distillation learns from: cross-entropy at the same temperature.

    Args:
        data: As for `recipe`.
        **given: Fields of `TrainingConfig`.

    >>> from robustkern.training import teacher_recipe
    >>> teacher_recipe("digits").method
    'standard'
    """
    temperature = METHODS["distillation"].options["temperature"]
    options = {"temperature": temperature, **given.pop("options", {})}
    return recipe(data, "standard", **{"lr": _DISTILLATION_LR, **given, "options": options})


def absolute(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings among these that are paths, as they are from any working directory."""
    named = {name: settings.get(name) for name in ("init", "extra")}
    return {name: str(Path(path).resolve()) for name, path in named.items() if path not in (None, "", PRETRAINED)}


def recipe(data: str, method: str = "standard", **given: Any) -> TrainingConfig:
    """The configuration for a data set and a method, with what is given in place of the recipe's values.

    Args:
        data: A name of `robustkern.data.NAMES`, or the path of an image folder.
        method: A name of `METHODS`.
        **given: Fields of `TrainingConfig`; `options` are completed from the recipe's and the method's own.

    >>> from robustkern.training import recipe
    >>> config = recipe("fashion-mnist", "gradient-penalty", epochs=2)
    >>> config.method, config.eps, config.epochs
    ('gradient-penalty', 0.1, 2)
    """
    # An image folder is the same one from any working directory.
    data = data if data in _RECIPES or not Path(data).is_dir() else str(Path(data).resolve())
    given.update(absolute(given))
    values: dict[str, Any] = {"threads": torch.get_num_threads(), **_RECIPES.get(data, {})}
    if method in _AT_THE_ADVERSARY:
        values["ramp"] = 0.0
    if method == "distillation":
        values["lr"] = _DISTILLATION_LR
    values.update(given)
    options = dict(values.pop("options", {}))
    if method in METHODS:
        usual = dict(_BY_METHOD.get(data, {}).get(method, {}))
        if data in _SMOOTHING and "label_smoothing" in METHODS[method].options and method not in _HARD_LABELS:
            usual["label_smoothing"] = _SMOOTHING[data]
        options = METHODS[method].complete(method, {**usual, **options})
    return TrainingConfig(data=data, method=method, options=options, **values)
