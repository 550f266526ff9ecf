"""Weights as one safetensors file that says which model they belong to and verifies when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import models

from .checkpoint import CheckpointError, check_finite
from .files import write_atomically

_KEY = "robustkern"


def save_weights(path: Path, model: nn.Module | Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, atomically.

    Args:
        path: The file.
        model: The model or its state; all of it is saved, normalisation included.
        description: What `load_model` needs to build it again: model, classes, in_shape, and anything else.
    """
    from safetensors.torch import save

    check_finite(model)
    values = model.state_dict() if isinstance(model, nn.Module) else model
    state = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    header = {**description, "sha256": _digest(state)}
    write_atomically(path, save(state, metadata={_KEY: json.dumps(header, sort_keys=True)}))


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run in eval mode, and its description.

    Args:
        path: A run directory, whose `model.safetensors` is taken, or one of its weight files.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a run writes it at the end of each epoch")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: truncated, corrupt or not written by robustkern ({error})") from error
    if _digest(state) != header.get("sha256"):
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the one it was saved with")
    # The initial weights are overwritten at once; the caller's generator must not notice them.
    with torch.random.fork_rng(devices=[]):
        model = models.create(header["model"], len(header["classes"]), tuple(header["in_shape"]))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: not the weights of a {header['model']} ({reason})") from error
    return model.eval(), header


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {list(state[name].shape)}".encode())
        digest.update(state[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
