"""The model that a run begins with: built by its name, with weights of any origin, and checked on two images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import models
from robustkern._text import brief
from robustkern.attacks import attacked
from robustkern.data import Images
from robustkern.models import named
from robustkern.models.smooth import CountReLUs

from .checkpoint import CheckpointError
from .errors import UsageError, require
from .weights import KEY, read_tensors, verify

PRETRAINED = "pretrained"
_NORMALIZE, _NETWORK = "normalize.", "network."
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # that DistributedDataParallel, torch.compile and others put in front
_STATES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")  # of a file of torch.save
_SHOWN = 4  # names of each kind in a sentence


@dataclass(frozen=True)
class ModelSpec:
    """Which model, with which weights.

    Attributes:
        name: As `robustkern.models.create` takes it.
        options: Keyword arguments of the network.
        init: A file of weights, a run directory, "pretrained", or "" for random weights.
        smooth: What replaces ReLU modules: "gelu" or "silu"; "none": nothing.
        mean: Mean of each channel that images are normalised with; (): that of the weights or of the data.
        std: Standard deviation of each channel, likewise.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    smooth: str = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def initial_model(spec: ModelSpec, data: Images, *, trained: bool = False) -> tuple[nn.Module, str]:
    """The model for a data set, and one sentence about every key of its weights that does not fit; "" if all do.

    Random weights come from PyTorch's global generator. Images are normalised by what is given; else by what the
    weights' file says, `normalize.mean` and `normalize.std`; else, with weights of one of timm's networks, by what timm
    says about them; else by the statistics of the data.

    Args:
        spec: Which model, with which weights.
        data: What it shall classify.
        trained: Whether the weights are those of a classifier of these images, to be used as it is. Then all of them
            must fit, the data's statistics are not asked, and a function's network takes images in [0, 1].

    Raises:
        UsageError: There is no such model, it does not take the images, or the weights are of another network.
        CheckpointError: The weights cannot be read.
    """
    loaded = None if spec.init in ("", PRETRAINED) else read_state(Path(spec.init))
    mean, std = spec.mean, spec.std
    if not mean:
        theirs = named.own_statistics(spec.name, data.in_shape[0]) if spec.init else None
        inside = loaded is not None and _NORMALIZE + "mean" in loaded
        if theirs is not None and not inside:
            mean, std = theirs
        elif not trained:
            mean, std = data.statistics()
        else:
            known = inside or named.is_function(spec.name)
            require(known, f"{spec.init} does not say how it normalises images: give --data-mean and --data-std")
    try:
        model = models.create(
            spec.name, data.num_classes, data.in_shape, mean, std, options=spec.options, smooth=spec.smooth,
            pretrained=spec.init == PRETRAINED,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
    problems = ""
    if loaded is not None:
        if spec.mean:
            loaded = {name: value for name, value in loaded.items() if not name.startswith(_NORMALIZE)}
        problems = load_what_fits(model, loaded, spec.init, strict=trained)
    if spec.name not in models.MODELS or spec.smooth != "none":
        problems = "; ".join(filter(None, [problems, check_classifier(model, spec, data)]))
    return model, problems


def check_classifier(model: nn.Module, spec: ModelSpec, data: Images) -> str:
    """UsageError unless the model gives logits of the data's classes; a sentence if a ReLU to be replaced is left."""
    with torch.random.fork_rng(devices=[]), attacked(model), torch.no_grad(), CountReLUs() as left:
        try:
            shape = tuple(getattr(model(torch.zeros(2, *data.in_shape)), "shape", ()))
        except Exception as error:  # whatever a foreign module raises
            raise UsageError(
                f"model {spec.name} does not take the images of {data.name}, {list(data.in_shape)}: {brief(error)}"
            ) from error
    if shape != (2, data.num_classes):
        raise UsageError(
            f"model {spec.name} gives {list(shape)} for two images, {data.name} takes logits of {data.num_classes} "
            "classes"
        )
    if spec.smooth == "none" or not left.count:
        return ""
    return f"model {spec.name} still calls ReLU {left.count} times, as a function: {spec.smooth} replaces modules only"


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a file: safetensors, or of torch.save, which is read with `weights_only`; or of a run directory.

    Names are those of the network, `normalize.mean` and `normalize.std`; prefixes that wrappers put in front are gone.

    Raises:
        CheckpointError: The file is missing, damaged, holds no weights or would run code.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        state, metadata = read_tensors(path)
        if KEY in metadata:
            verify(path, state, metadata)
        return _unwrapped(state)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a file it refuses
        reason = brief(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise CheckpointError(f"{path} is no file of weights that can be loaded safely ({reason})") from error
    inner = next(
        (content[name] for name in _STATES if isinstance(content, dict) and _is_state(content.get(name))), None
    )
    state = content if inner is None else inner
    if not _is_state(state):
        raise CheckpointError(f"{path} holds no weights: neither tensors by name nor such under {', '.join(_STATES)}")
    return _unwrapped({str(name): value for name, value in state.items() if isinstance(value, Tensor)})


def load_what_fits(model: nn.Module, state: Mapping[str, Tensor], source: str, *, strict: bool = False) -> str:
    """Loads every tensor of the same name and shape; one sentence about all others, "" if there are none.

    Args:
        model: As `robustkern.models.create` made it; changed in place.
        state: Names without the model's own "network.".
        source: Where it comes from, for messages.
        strict: Whether that sentence is an error.

    Raises:
        UsageError: Nothing fits; or, if strict, not everything does.
    """
    target = {name.removeprefix(_NETWORK): value for name, value in model.state_dict().items()}
    fits = {name: value for name, value in state.items() if name in target and target[name].shape == value.shape}
    weights = [name for name in target if not name.startswith(_NORMALIZE)]
    require(any(name in fits for name in weights), f"none of the weights in {source} fits the model")
    kinds = {
        "of another shape": [
            f"{name} {list(state[name].shape)}, not {list(value.shape)}"
            for name, value in target.items()
            if name in state and name not in fits
        ],
        "missing": [name for name in weights if name not in state],
        "unknown": [name for name in state if name not in target and not name.startswith(_NORMALIZE)],
    }
    found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names)
    require(not (strict and found), f"the weights in {source} are not the model's: {found}")
    with torch.no_grad():
        for name, value in model.state_dict().items():  # of which the tensors are the model's own
            if name.removeprefix(_NETWORK) in fits:
                value.copy_(fits[name.removeprefix(_NETWORK)])
    return f"{source} does not fit everywhere, what does not keeps its random weights: {found}" if found else ""


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*map(brief, names[:_SHOWN]), *more])


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without prefixes that all names share, and without our own "network."."""
    names = dict(state)
    while prefix := next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
    ours = all(name.startswith((_NETWORK, _NORMALIZE)) for name in names)
    return {name.removeprefix(_NETWORK): value for name, value in names.items()} if ours else names
