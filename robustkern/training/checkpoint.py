"""Checkpoints that survive anything: written atomically, verified when read, the last ones kept.

A checkpoint is two files, `checkpoint-<step>.pt` with the state and `checkpoint-<step>.json`, its manifest, with size
and SHA-256 of the first. The manifest is written last: without it there is no checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .averaging import WeightAverage
from .errors import TrainingError
from .files import sync_directory, write_atomically

_FORMAT = 2
_KEEP = 2  # one that is being written over by nobody, and one more in case it does not verify
_NAME = re.compile(r"checkpoint-(\d{9})\.json")


Row = dict[str, float | None]  # the metrics of one epoch; None where something was not measured


class CheckpointError(TrainingError):
    """A checkpoint is damaged or belongs to something else."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: Steps taken, skipped ones included.
        epoch: The epoch it is in, from 0.
        skipped: Steps skipped in a row for a non-finite loss or gradient.
        sums: Sums over the steps of this epoch, for its row of metrics.
        rows: The rows of metrics of the epochs completed.
        best: Of the weights that were best on the validation set: epoch, which weights, their accuracies.
        ended: Stopped by the watch for catastrophic overfitting, before the last epoch.
    """

    step: int
    epoch: int
    skipped: int
    sums: dict[str, float]
    rows: list[Row]
    best: dict[str, Any] | None = None
    ended: bool = False


@dataclass
class TrainState:
    """All there is to resume a run from.

    Attributes:
        progress: Where it stands.
        model: Its weights and buffers.
        optimizer: Its buffers.
        average: The average of the weights, if the run keeps one.
        best: The state of the model that was best on the validation set.
    """

    progress: Progress
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    best: dict[str, Tensor] | None = None

    def to_bytes(self) -> bytes:
        average = None
        if self.average is not None:
            average = {"model": self.average.model.state_dict(), "updates": self.average.updates}
        state = {
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "best": self.best,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def load_bytes(self, content: bytes, source: str) -> None:
        """Become what `to_bytes` wrote; on an error nothing has changed.

        Args:
            content: Its result.
            source: What errors call it.

        Raises:
            CheckpointError: It is something else, or of another model, optimizer or version.
        """
        try:
            # weights_only: tensors and containers, no code, even from a file whose manifest was forged with it.
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds on a file it refuses
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{source} is not a checkpoint that can be loaded safely ({reason})") from error
        if not isinstance(state, dict) or set(state) != {"progress", "model", "optimizer", "average", "best"}:
            raise CheckpointError(f"{source} is not a robustkern checkpoint")
        current = self.model.state_dict()
        _check_layout(state["model"], current, source)
        try:
            progress = Progress(**state["progress"])
            if (state["average"] is None) != (self.average is None):
                raise ValueError("one has an average of the weights, the other has not")
            if self.average is not None:
                _check_layout(state["average"]["model"], current, source)
                updates = int(state["average"]["updates"])
            if state["best"] is not None:
                _check_layout(state["best"], current, source)
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{source} belongs to another optimizer or version ({error})") from error
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"]["model"])
            self.average.updates = updates
        self.progress, self.best = progress, state["best"]


def save_checkpoint(folder: Path, state: TrainState, fingerprint: str) -> Path:
    """Write a checkpoint, then remove those older than the last two.

    Args:
        folder: The run directory.
        state: What to save.
        fingerprint: What the checkpoint belongs to; loading under another one is refused.

    Raises:
        TrainingError: A weight is not finite, or the disk is full; older checkpoints are left alone.
    """
    check_finite(state.model)
    if state.average is not None:
        check_finite(state.average.model)
    progress, content = state.progress, state.to_bytes()
    manifest = {
        "format": _FORMAT,
        "step": progress.step,
        "epoch": progress.epoch,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fingerprint": fingerprint,
        "torch": torch.__version__,
    }
    path = folder / f"checkpoint-{progress.step:09d}.pt"
    try:
        # A checkpoint of this step, if there is one, is not to be described by the old manifest while it is replaced.
        path.with_suffix(".json").unlink(missing_ok=True)
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(
            f"cannot write {path} ({error.strerror or error}); the checkpoints before it are intact"
        ) from error
    for manifest_path in _manifests(folder)[_KEEP:]:
        manifest_path.unlink(missing_ok=True)
    kept = {manifest_path.with_suffix(".pt") for manifest_path in _manifests(folder)}
    for orphan in set(folder.glob("checkpoint-*.pt")) - kept:
        orphan.unlink(missing_ok=True)
    sync_directory(folder)
    return path


def load_latest(folder: Path, state: TrainState, fingerprint: str) -> list[str]:
    """Restore the newest checkpoint that verifies; if the folder holds none at all, leave the state as it is.

    Returns:
        One sentence for each checkpoint that was passed over.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
    """
    problems: list[str] = []
    for manifest_path in _manifests(folder):
        path = manifest_path.with_suffix(".pt")
        try:
            state.load_bytes(_read_verified(manifest_path, fingerprint), str(path))
            return problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(problems))
    return problems


def check_finite(model: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite: saved, they would push the healthy checkpoints out."""
    values = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingError(f"{name} is not finite any more: nothing was saved over the last checkpoint")


def _manifests(folder: Path) -> list[Path]:
    """Manifests, newest first."""
    return sorted((path for path in folder.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)), reverse=True)


def _read_verified(manifest_path: Path, fingerprint: str) -> bytes:
    path = manifest_path.with_suffix(".pt")
    try:
        manifest = json.loads(manifest_path.read_text())
        expected_bytes, expected_hash = int(manifest["bytes"]), str(manifest["sha256"])
        written_format, written_fingerprint = manifest["format"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest_path} is damaged ({type(error).__name__})") from error
    if written_format != _FORMAT:
        raise CheckpointError(f"{path} has format {written_format}, this version reads {_FORMAT}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) != expected_bytes:
        raise CheckpointError(f"{path} is truncated: {len(content)} of {expected_bytes} bytes")
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the one in its manifest")
    if written_fingerprint != fingerprint:
        raise CheckpointError(f"{path} belongs to another architecture or data set")
    return content


def _check_layout(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state whose tensors are not those of the model."""
    for name in sorted(set(saved) ^ set(current)):
        raise CheckpointError(f"{source} belongs to another architecture: {name} is in only one of the two")
    for name, value in current.items():
        if saved[name].shape != value.shape or saved[name].dtype != value.dtype:
            raise CheckpointError(
                f"{source} belongs to another architecture: {name} is {list(saved[name].shape)} there "
                f"and {list(value.shape)} here"
            )


def fingerprint(model: nn.Module, classes: tuple[str, ...]) -> str:
    """What a checkpoint belongs to: names, shapes and types of the state, and the classes."""
    layout = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return hashlib.sha256(json.dumps([layout, classes]).encode()).hexdigest()
