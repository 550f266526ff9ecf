"""Weights as one safetensors file that says which model they belong to and is verified when it is read."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import models
from robustkern._files import parse_json, read_bytes
from robustkern._text import brief
from robustkern.data import Images
from robustkern.models import named

from .checkpoint import CheckpointError, check_finite, check_layout
from .errors import UsageError, require
from .files import write_atomically

KEY = "robustkern"  # of our metadata
_MOST_BYTES = 16 << 30


def save_weights(path: Path, model: nn.Module | Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, atomically.

    Args:
        path: The file.
        model: The model or its state; all of it is saved, normalisation included.
        description: What `load_model` needs to build it again: model, classes, in_shape, and anything else.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from robustkern.models import create
    >>> from robustkern.training import load_model, save_weights
    >>> model = create("small-cnn", 10, (1, 8, 8)).eval()
    >>> description = {"model": "small-cnn", "classes": list("0123456789"), "in_shape": [1, 8, 8]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(Path(folder) / "model.safetensors", model, description)
    ...     again, _ = load_model(Path(folder) / "model.safetensors")
    >>> x = torch.rand(2, 1, 8, 8)
    >>> torch.equal(again(x), model(x))
    True
    """
    check_finite(model)
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    header = {**description, "sha256": digest(state)}
    write_tensors(path, state, {KEY: json.dumps(header, sort_keys=True)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(stored, metadata=metadata))


def load_model(path: str | Path, model: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run in eval mode, and its description.

    Args:
        path: A run directory, whose `model.safetensors` is taken, or one of its weight files.
        model: The model's name. Needed where it is `package.module:function`: no file decides which code is run.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt or not one of ours.
        UsageError: The file is of another model, or of a function that is not named.

    >>> import tempfile
    >>> from robustkern.training import load_model, recipe, train
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = recipe("digits", epochs=1, train_samples=64, eval_samples=10)
    ...     _ = train(config, f"{folder}/run", draw=False)
    ...     model, description = load_model(f"{folder}/run")
    >>> model(torch.rand(2, 1, 8, 8)).shape, description["model"]
    (torch.Size([2, 10]), 'small-cnn')
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a run writes it at the end of each epoch")
    state, metadata = read_tensors(path)
    header = verify(path, state, metadata)
    name = header["model"]
    require(model in (None, name), f"{path} is of model {name}, not {model}")
    require(
        model is not None or not named.is_function(name),
        f"{path} is of model {name}: no file decides which code is run, so name it yourself, by --model {name}",
    )
    create = partial(
        models.create, name, len(header["classes"]), tuple(header["in_shape"]),
        options=header.get("model_options", {}), smooth=header.get("smooth_activations", "none"),
    )  # fmt: skip
    try:
        if not named.is_function(name):
            _check_on_meta(state, create, path)
        # The initial weights are overwritten at once; the caller's generator must not notice them.
        with torch.random.fork_rng(devices=[]):
            made = create()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: truncated, corrupt or not written by robustkern ({brief(error)})") from error
    check_layout(state, made.state_dict(), str(path))
    made.load_state_dict(state)
    return made.eval(), header


def _check_on_meta(state: Mapping[str, Tensor], create: Callable[[], nn.Module], path: Path) -> None:
    """Refuses what does not fit before it takes memory: the file decides how large the model is."""
    try:
        with torch.device("meta"):
            expected = create().state_dict()
    except NotImplementedError:  # the network computes what cannot be computed from shapes alone
        return
    check_layout(state, expected, str(path))


def verify(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description of a model in a file of `save_weights`.

    Raises:
        CheckpointError: It is not one, or the weights are not those that it was written with.
    """
    try:
        header: dict[str, Any] = parse_json(metadata[KEY])
        _check_description(header)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated, corrupt or not written by robustkern ({brief(error)})") from error
    if digest(state) != header.get("sha256"):
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the one it was saved with")
    return header


def load_model_for(path: str | Path, data: Images, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """`load_model`, for a model that takes the images of `data` and has the same classes.

    Raises:
        CheckpointError: As `load_model`.
        UsageError: The images have another shape, or the classes other names.
    """
    model, header = load_model(path, name)
    theirs, mine = (tuple(header["in_shape"]), tuple(header["classes"])), (data.in_shape, data.classes)
    if theirs != mine:
        (shape, classes), (in_shape, names) = theirs, mine
        raise UsageError(
            f"{path} takes images {list(shape)} of {_names(classes, names)}, {data.name} has {list(in_shape)} of "
            f"{_names(names, classes)}"
        )
    return model, header


def _names(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    """How many classes there are, and the names around the first one that differs from the other list."""
    parting = next((i for i, (a, b) in enumerate(zip(classes, others)) if a != b), 0)
    shown = classes[max(0, parting - 2) : parting + 3]
    dots = ["..."] * (parting > 2), ["..."] * (parting + 3 < len(classes))
    return f"{len(classes)} classes ({', '.join([*dots[0], *map(brief, shown), *dots[1]])})"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a safetensors file holds: tensors and metadata.

    Raises:
        CheckpointError: It is not a safetensors file, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Not `safe_open`: it refuses paths that are not UTF-8.
        content = read_bytes(path, _MOST_BYTES)
        tensors = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__", {})
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    # PyTorch has no tensors of some types and shapes that the format can describe.
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated, corrupt or not a safetensors file ({brief(error)})") from error


def _check_description(header: Any) -> None:
    """ValueError unless it describes one of our models, as `save_weights` was given it."""
    options = header.get("model_options", {}) if isinstance(header, dict) else {}
    if not isinstance(options, dict) or not isinstance(header, dict) or not isinstance(header.get("model"), str):
        raise ValueError("it names no model")
    models.check_name(header["model"], options)
    if header.get("smooth_activations", "none") not in ("none", *models.SMOOTH):
        raise ValueError("its smooth_activations is no activation")
    classes, shape, eps = header.get("classes"), header.get("in_shape"), header.get("eps", 1.0)
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of two names or more")
    sizes = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n < 1 << 16 for n in shape)
    if not sizes:
        raise ValueError("its in_shape is not [C, H, W]")
    if type(eps) not in (int, float) or not 0 < eps <= 1:
        raise ValueError("its eps is not in (0, 1]")
    size, crop = header.get("image_size", 0), header.get("eval_crop", 1.0)
    if type(size) is not int or not 0 <= size < 1 << 16 or type(crop) not in (int, float) or not 0 < crop <= 1:
        raise ValueError("its image_size or eval_crop is none")
    if not all(isinstance(header.get(name, ""), str) for name in ("data", "method", "sha256")):
        raise ValueError("its data, method or sha256 is no text")


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {state[name].dtype} {list(state[name].shape)}".encode())
        found.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
