"""What each data set is trained with when the user does not say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .config import TrainingConfig
from .methods import METHODS

# Radii at which the images keep their meaning for a person: digits of 8x8 pixels in 17 grey levels and clothes in 28x28
# stand more than photographs do.
_RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"eps": 0.15, "epochs": 60, "batch_size": 128, "lr": 0.1},
    "mnist": {"eps": 0.2, "epochs": 15, "batch_size": 128, "lr": 0.05},
    "fashion-mnist": {"eps": 0.1, "epochs": 15, "batch_size": 128, "lr": 0.05},
    "cifar10": {"eps": 8 / 255, "epochs": 30, "batch_size": 128, "lr": 0.1, "model": "preact-resnet18"},
}
_PENALTY_WEIGHT = {"digits": 5.0}


def recipe(data: str, method: str = "standard", **given: Any) -> TrainingConfig:
    """The configuration for a data set and a method, with what is given in place of the recipe's values.

    Args:
        data: A name of `robustkern.data.NAMES`, or the path of an image folder.
        method: A name of `METHODS`.
        **given: Fields of `TrainingConfig`; `options` are completed from the recipe's and the method's own.
    """
    # An image folder is the same one from any working directory.
    data = data if data in _RECIPES or not Path(data).is_dir() else str(Path(data).resolve())
    values: dict[str, Any] = {"threads": torch.get_num_threads(), **_RECIPES.get(data, {}), **given}
    options = dict(values.pop("options", {}))
    if method in METHODS:
        if "weight" in METHODS[method].options and data in _PENALTY_WEIGHT:
            options.setdefault("weight", _PENALTY_WEIGHT[data])
        options = METHODS[method].complete(method, options)
    return TrainingConfig(data=data, method=method, options=options, **values)
