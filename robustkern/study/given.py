"""Networks that a study measures without having trained them."""

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

from robustkern._text import brief
from robustkern.attacks import attacked
from robustkern.data import Dataset
from robustkern.training import UsageError
from robustkern.training.errors import require
from robustkern.training.evaluation import device_of
from robustkern.training.initial import ModelSpec, initial_model
from robustkern.training.weights import load_model_for


def parse_given(text: str) -> tuple[str, str]:
    """Name and source from "NAME=SOURCE".

    Args:
        text: What the user wrote.

    Raises:
        UsageError: It does not have this form.
    """
    name, _, source = (part.strip() for part in text.partition("="))
    if not name or not source or "/" in name or not (Path(source).exists() or all(source.split(":", 1))):
        raise UsageError(f"--checkpoint: NAME=RUN, NAME=module:function or NAME=MODEL@FILE, got {text!r}")
    return name, source


def load_given(source: str, data: Dataset) -> nn.Module:
    """A network from a run directory, a weight file of one, a Python callable, or a model with weights from a file.

    Args:
        source: A path, or "module:function"; the function is called without arguments and returns a module that maps
            images in [0, 1] to logits. Modules of the working directory are found. Or "MODEL@FILE": a name that
            `robustkern.models.create` takes and a file that `robustkern.training.initial.read_state` reads.
        data: The data whose images it must take and whose classes it must know.

    Returns:
        The network in eval mode.

    Raises:
        UsageError: There is nothing there, or the network does not fit the data.
        CheckpointError: The run's weights are damaged.
    """
    path = Path(source)
    if path.exists():
        model = load_model_for(path, data)[0]
    elif "@" in source:
        name, _, file = source.partition("@")
        model, problem = initial_model(ModelSpec(name, init=file), data, trained=True)
        require(not problem, problem)
    elif ":" in source:
        model = _call(*source.split(":", 1))
    else:
        raise UsageError(f"{source}: neither a run directory, a weight file, module:function nor MODEL@FILE")
    model.eval()
    try:
        with attacked(model), torch.no_grad():
            shape = tuple(getattr(model(data.images[:2].to(device_of(model))), "shape", ()))
    except Exception as error:  # whatever a foreign module raises
        raise UsageError(f"{source} does not take images of {data.name}, {data.in_shape}: {brief(error)}") from error
    if shape != (2, data.num_classes):
        raise UsageError(
            f"{source} gives {shape} for two images, {data.name} takes logits of {data.num_classes} classes"
        )
    return model


def _call(module: str, function: str) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # it runs foreign code
        raise UsageError(f"{module}:{function}: {type(error).__name__}: {brief(error)}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{module}:{function} returned a {type(made).__name__}, not a torch.nn.Module")
    return made
