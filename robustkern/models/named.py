"""Networks by name: the built-in ones, `timm:NAME`, and `package.module:function`."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from robustkern._packages import pip_install
from robustkern._text import brief

_TIMM = "timm:"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TIMM_NAME = re.compile(r"timm:[\w.]+")  # none of its schemes, which download or open files
# Arguments of timm.create_model that are known from the data, or that would open files and change the network's kind.
_KNOWN = ("num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
          "cache_dir", "features_only")  # fmt: skip


def is_function(name: str) -> bool:
    """Whether a model's name is one of a function, which is code of the user's."""
    return not name.startswith(_TIMM) and _FUNCTION.fullmatch(name) is not None


def is_timm(name: str) -> bool:
    """Whether a model's name is one of timm's."""
    return name.startswith(_TIMM)


def check_name(name: str, options: Mapping[str, Any], builtin: Mapping[str, Any]) -> None:
    """ValueError unless a model can have this name and these keyword arguments; imports nothing."""
    if name not in builtin and not _TIMM_NAME.fullmatch(name) and not is_function(name):
        known = ", ".join(builtin)
        raise ValueError(f"no model {name!r}: choose one of {known}, timm:NAME, or package.module:function")
    if is_timm(name):
        for taken in sorted(set(options) & set(_KNOWN)):
            raise ValueError(f"model {name}: {taken} is not among its options: the data and `init` decide it")


def network(
    name: str, num_classes: int, in_shape: tuple[int, int, int], options: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    """A network of timm, or of a function; ValueError if there is none, or it refuses its arguments."""
    make = _of_timm if is_timm(name) else _of_function
    try:
        made = make(name, num_classes, in_shape, options, pretrained)
    except ImportError as error:
        if is_timm(name) and (error.name or "").partition(".")[0] in ("timm", "torchvision"):
            raise ValueError(f"model {name} needs timm: {pip_install('timm')}") from error
        raise ValueError(f"model {name}: {brief(error)}") from error
    except NotImplementedError:  # an operator without a meta kernel
        raise
    except Exception as error:  # it runs foreign code
        raise ValueError(f"model {name}: {type(error).__name__}: {brief(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"model {name} is a {type(made).__name__}, not a torch.nn.Module")
    return made


def own_statistics(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that a network's published weights take their images with; None where nobody knows."""
    if not is_timm(name):
        return None
    import timm

    found = timm.get_pretrained_cfg(name.removeprefix(_TIMM))
    if found is None or len(found.mean) != channels:
        return None
    return tuple(map(float, found.mean)), tuple(map(float, found.std))


def _of_timm(
    name: str, num_classes: int, in_shape: tuple[int, int, int], options: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    import timm

    name = name.removeprefix(_TIMM)
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_shape[0]}
    published = timm.get_pretrained_cfg(name)
    # Those of one size, transformers, are built for the size of the images.
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = in_shape[1:]
    made: nn.Module = timm.create_model(name, pretrained=pretrained, **{**arguments, **options})
    return made


def _of_function(
    name: str, num_classes: int, in_shape: tuple[int, int, int], options: Mapping[str, Any], pretrained: bool
) -> Any:
    if pretrained:
        raise TypeError("pretrained weights of a function are an argument of its own: give it as a model option")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, path = name.split(":")
    function: Any = importlib.import_module(module)
    for part in path.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments: dict[str, Any] = {}
    if anything or "num_classes" in parameters:
        arguments["num_classes"] = num_classes
    if "in_shape" in parameters:
        arguments["in_shape"] = in_shape
    return function(**{**arguments, **options})
