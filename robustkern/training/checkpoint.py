"""Checkpoints: written atomically, verified when read, the last two kept.

A checkpoint is two files, `checkpoint-<step>.pt` with the state and `checkpoint-<step>.json`, its manifest, with size
and SHA-256 of the first. The manifest is written last: without it there is no checkpoint.
"""

import copy
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern._files import parse_json, read_bytes
from robustkern._pickles import check_pickle
from robustkern._sharded import divided_like, whole
from robustkern._text import brief
from robustkern.data import Images

from .averaging import WeightAverage
from .config import TrainingConfig
from .errors import TrainingError, UsageError
from .files import sync_directory, write_atomically

_FORMAT = 3
_KEEP = 2  # the last one, and the one before it in case the last does not verify
_NAME = re.compile(r"checkpoint-(\d{9})\.json")
_MOST_MANIFEST = 1 << 17  # bytes; it has a hundredth of that
_MOST_INSTRUCTIONS = 1 << 20  # of a pickle; a thousand epochs take a twentieth of that
_MOST_PICKLE = 8 << 20  # bytes; numbers and names, most of them in the rows of metrics
# What `torch.save` needs for tensors and containers.
_HARMLESS = re.compile(r"collections OrderedDict|torch(\._utils _rebuild_tensor_v2| \w+Storage|\.storage \w+Storage)")


# What every row of metrics and every record of the best weights has at least.
_COLUMNS = {"epoch", "step", "orientation", "smoothness", "clean_accuracy", "robust_accuracy", "ms_per_step", "skipped"}
_OF_THE_BEST = {"epoch", "validation_clean_accuracy", "validation_robust_accuracy"}

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
        best: The epoch, kind and accuracies of the weights that were best on the validation set.
        ended: Whether the watch for catastrophic overfitting stopped the run before the last epoch.

    >>> from robustkern.training import Progress
    >>> Progress(step=10, epoch=1, skipped=0, sums={}, rows=[]).ended
    False
    """

    step: int
    epoch: int
    skipped: int
    sums: dict[str, float]
    rows: list[Row]
    best: dict[str, Any] | None = None
    ended: bool = False

    def check(self) -> None:
        """ValueError unless every value has its type."""
        for name in ("step", "epoch", "skipped"):
            _require(type(getattr(self, name)) is int and 0 <= getattr(self, name) < 1 << 62, name)
        _require(_is_row(self.sums) and None not in self.sums.values(), "sums")
        rows = isinstance(self.rows, list) and all(_is_row(row) and set(row) >= _COLUMNS for row in self.rows)
        _require(rows and len(self.rows) == self.epoch, "rows")
        if self.best is not None:
            best = dict(self.best)
            weights = best.pop("weights", None)
            _require(weights in ("last", "ema") and set(best) == _OF_THE_BEST, "best")
            _require(_is_row(best) and None not in best.values(), "best")
        _require(isinstance(self.ended, bool), "ended")


@dataclass
class TrainState:
    """Everything that a run is resumed from.

    Attributes:
        progress: Where it stands.
        model: Its weights and buffers.
        optimizer: Its buffers.
        average: The average of the weights, if the run keeps one.
        best: The state of the model that was best on the validation set.
        replica: If FSDP2 manages the model, one that it does not, on the CPU; its weights are of no account.
    """

    progress: Progress
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    best: dict[str, Tensor] | None = None
    replica: nn.Module | None = None

    def parts(self, keep: bool = True) -> dict[str, Any]:
        """What a checkpoint has: whole tensors, so that any number of processes goes on, divided or not.

        If FSDP2 manages the model, all processes must call it; where `keep` is false the tensors are dropped.
        """
        average = None
        if self.average is not None:
            average = {"model": self.average.model.state_dict(), "updates": self.average.updates}
        parts = {
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
            "best": self.best,
        }
        return parts if self.replica is None else whole(parts, keep)

    def undivided(self, model: nn.Module) -> nn.Module:
        """The model, or its average, for use outside the training; all processes must call it."""
        if self.replica is None:
            return model
        device = next(model.parameters()).device
        plain = copy.deepcopy(self.replica).to(device)
        plain.load_state_dict(whole(model.state_dict()))
        return plain

    def to_bytes(self) -> bytes:
        return to_bytes(self.parts())

    def load_bytes(self, content: bytes, source: str) -> None:
        """Restore what `to_bytes` wrote; after an error nothing has changed.

        Args:
            content: Its result.
            source: Its name in errors.

        Raises:
            CheckpointError: It is something else, or of another model, optimizer or version.
        """
        try:
            check_archive(content)
            # weights_only: tensors and containers, no code, even if file and manifest were forged.
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds on a file it refuses
            reason = brief(str(error).strip().partition("\n")[0]) or type(error).__name__
            raise CheckpointError(f"{source} is not a checkpoint that can be loaded safely ({reason})") from error
        if not isinstance(state, dict) or set(state) != {"progress", "model", "optimizer", "average", "best"}:
            raise CheckpointError(f"{source} is not a robustkern checkpoint")
        current = self.model.state_dict()
        check_layout(state["model"], current, source)
        try:
            progress = Progress(**state["progress"])
            progress.check()
            _require(set(progress.sums) == set(self.progress.sums), "sums")
            if (state["average"] is None) != (self.average is None):
                raise ValueError("one has an average of the weights, the other has not")
            if self.average is not None:
                check_layout(state["average"]["model"], current, source)
                updates = state["average"]["updates"]
                _require(type(updates) is int and updates >= 0, "updates of the average")
            if state["best"] is not None:
                check_layout(state["best"], current, source)
            _check_buffers(state["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(_divided(state["optimizer"], self.optimizer))
        # What should be a mapping may be of any type.
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{source} belongs to another optimizer or version ({brief(error)})") from error
        _load(self.model, state["model"])
        if self.average is not None:
            _load(self.average.model, state["average"]["model"])
            self.average.updates = updates
        self.progress, self.best = progress, state["best"]


def to_bytes(parts: dict[str, Any]) -> bytes:
    """What `TrainState.load_bytes` reads."""
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    return buffer.getvalue()


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    current = model.state_dict()
    model.load_state_dict({name: divided_like(value, current[name]) for name, value in state.items()})


def _divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, divided as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def entries(number: int, entries: dict[str, Any]) -> dict[str, Any]:
        like = parameters[number]
        return {
            name: divided_like(value, like) if isinstance(value, Tensor) else value for name, value in entries.items()
        }

    return {**state, "state": {number: entries(number, each) for number, each in state["state"].items()}}


def save_checkpoint(folder: Path, parts: dict[str, Any], fingerprint: str, config: TrainingConfig) -> Path:
    """Write a checkpoint, then remove those older than the last two.

    Args:
        folder: The run directory.
        parts: What to save: `TrainState.parts`.
        fingerprint: What the checkpoint belongs to; loading under another one is refused.
        config: The run's configuration; loading under another one is refused.

    Raises:
        TrainingError: A weight is not finite, or the disk is full; older checkpoints are left alone.
    """
    check_finite(parts["model"])
    if parts["average"] is not None:
        check_finite(parts["average"]["model"])
    progress, content = parts["progress"], to_bytes(parts)
    manifest = {
        "format": _FORMAT,
        "step": progress["step"],
        "epoch": progress["epoch"],
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "fingerprint": fingerprint,
        "config": config.to_yaml(),
        "torch": torch.__version__,
    }
    path = folder / f"checkpoint-{progress['step']:09d}.pt"
    try:
        # While an older checkpoint of this step is replaced, no manifest may describe it.
        path.with_suffix(".json").unlink(missing_ok=True)
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(
            f"cannot write {path} ({error.strerror or error}); the checkpoints before it are intact"
        ) from error
    for manifest_path in manifests(folder)[_KEEP:]:
        manifest_path.unlink(missing_ok=True)
    kept = {manifest_path.with_suffix(".pt") for manifest_path in manifests(folder)}
    for orphan in set(folder.glob("checkpoint-*.pt")) - kept:
        orphan.unlink(missing_ok=True)
    sync_directory(folder)
    return path


def load_latest(
    folder: Path,
    state: TrainState,
    fingerprint: str,
    differences: Callable[[TrainingConfig], list[str]],
    on_content: Callable[[bytes], None] = lambda content: None,
) -> list[str]:
    """Restore the newest checkpoint that verifies; if the folder holds none at all, leave the state as it is.

    Args:
        folder: The run directory.
        state: What to restore.
        fingerprint: As for `save_checkpoint`.
        differences: What differs between the configuration that a checkpoint was written with and that of this run.
        on_content: Called with the content of the checkpoint that was restored.

    Returns:
        One sentence for each checkpoint that was passed over.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
        UsageError: One was written with other settings.
    """
    problems: list[str] = []
    # Weights, their average, the best ones and two buffers of an optimizer, twice over, and room for metrics.
    most = 10 * sum(value.nbytes for value in state.model.state_dict().values()) + _MOST_PICKLE
    for manifest_path in manifests(folder):
        path = manifest_path.with_suffix(".pt")
        try:
            content = _read_verified(manifest_path, fingerprint, differences, most)
            state.load_bytes(content, str(path))
            on_content(content)
            return problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(problems))
    return problems


def check_finite(model: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite: saving them would push the healthy checkpoints out."""
    values = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingError(f"{name} is not finite any more: nothing was saved over the last checkpoint")


def manifests(folder: Path) -> list[Path]:
    """Manifests, newest first."""
    return sorted((path for path in folder.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)), reverse=True)


def _read_verified(
    manifest_path: Path, fingerprint: str, differences: Callable[[TrainingConfig], list[str]], most: int
) -> bytes:
    path = manifest_path.with_suffix(".pt")
    try:
        manifest = parse_json(read_bytes(manifest_path, _MOST_MANIFEST))
        if (written_format := manifest["format"]) != _FORMAT:
            raise CheckpointError(f"{path} has format {brief(written_format)}, this version reads {_FORMAT}")
        expected_bytes, expected_hash = manifest["bytes"], manifest["sha256"]
        written_fingerprint = manifest["fingerprint"]
        written_config = TrainingConfig.from_yaml(manifest["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path} is damaged ({type(error).__name__})") from error
    try:
        content = read_bytes(path, most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) != expected_bytes:
        raise CheckpointError(f"{path} is truncated: {len(content)} of {brief(expected_bytes)} bytes")
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the one in its manifest")
    if changed := differences(written_config):
        raise UsageError(f"{path} was written with other settings: {', '.join(changed)}; start anew with another --out")
    if written_fingerprint != fingerprint:
        raise CheckpointError(f"{path} belongs to another architecture or data set")
    return content


def check_archive(content: bytes) -> None:
    """ValueError unless it is an archive of `torch.save`, and loading it makes nothing larger than the archive.

    Entries could be compressed, and the pickle could call functions that `weights_only` considers harmless, such as
    bytearray(10**12).
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        fits = sum(entry.file_size for entry in entries) <= len(content)
        _require(stored and fits, "entries, larger than they are stored")
        (pickled,) = (entry for entry in entries if entry.filename.endswith("data.pkl"))
        _require(pickled.file_size <= _MOST_PICKLE, f"numbers and names, more than {_MOST_PICKLE} bytes of them")
        for name in check_pickle(archive.read(pickled), _MOST_INSTRUCTIONS):
            if not _HARMLESS.fullmatch(name):
                raise ValueError(f"it wants to import {brief(name)}")


def check_layout(saved: Any, current: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state whose tensors are not those of the model."""
    if not isinstance(saved, Mapping) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise CheckpointError(f"{source} holds something else than the tensors of a model")
    for name in sorted(map(str, set(saved) ^ set(current))):
        raise CheckpointError(f"{source} belongs to another architecture: {brief(name)} is in only one of the two")
    for name, value in current.items():
        if saved[name].shape != value.shape or saved[name].dtype != value.dtype:
            raise CheckpointError(
                f"{source} belongs to another architecture: {name} is {saved[name].dtype} {list(saved[name].shape)} "
                f"there and {value.dtype} {list(value.shape)} here"
            )
        if saved[name].layout != torch.strided:
            raise CheckpointError(f"{source} belongs to another architecture: {name} is {saved[name].layout}")


def _check_buffers(state: Any, optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless every tensor of an optimizer's state is of the size of its parameter, or a single number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _require(set(state) == {"state", "param_groups"}, "parts of an optimizer's state")
    # Shallow: the content of a container may be larger than the file by any factor.
    for group, saved in zip(optimizer.param_groups, state["param_groups"]):
        for name in set(group) - {"params"}:
            kinds = (int, float) if type(group[name]) in (int, float) else (type(group[name]),)
            _require(type(saved[name]) in kinds, f"{name} of the parameters")
            numbers = saved[name] if isinstance(saved[name], tuple) else ()
            _require(all(type(number) is float for number in numbers), f"{name} of the parameters")
    for number, buffers in state["state"].items():
        for name, buffer in buffers.items():
            sizes = ((), parameters[number].shape)
            fits = buffer is None or (isinstance(buffer, Tensor) and buffer.layout == torch.strided)
            _require(fits and (buffer is None or tuple(buffer.shape) in sizes), f"{name} of parameter {number}")


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(
        isinstance(name, str) and (value is None or type(value) in (int, float)) for name, value in row.items()
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"it has unexpected {what}")


def fingerprint(model: nn.Module, data: Images) -> str:
    """What a checkpoint belongs to: names, shapes and types of the state, the classes, and every sample's label."""
    layout = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return hashlib.sha256(json.dumps([layout, data.classes, data.labels.tolist()]).encode()).hexdigest()
