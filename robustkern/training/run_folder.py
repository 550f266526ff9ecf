"""The folder of a run: every file that a run writes, and the right to write there, which is checked first."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from robustkern._files import read_bytes
from robustkern._text import brief
from robustkern.data import Dataset, Images

from .checkpoint import CheckpointError, Row, TrainState, fingerprint, load_latest, manifests, save_checkpoint
from .config import TrainingConfig
from .distributed import Group
from .errors import UsageError, naming, require
from .files import RunLock, names_in, remove_stale, write_atomically
from .methods import METHODS
from .weights import save_weights
from .yaml_files import MOST_BYTES

_DRAWN_FROM = 500  # test images of a data set that is read while it is used


class RunFolder:
    """The files of a run, each written atomically by the first process; an error there is an error in all of them.

    Args:
        path: The folder; made if missing.
        config: Of the run.
        group: Its processes, all of which call every method.
        train_set: What is trained on.
    """

    def __init__(self, path: Path, config: TrainingConfig, group: Group, train_set: Images) -> None:
        self.path, self.config, self.group, self.train_set = path, config, group, train_set
        self._fingerprint, self._saved = "", (-1, -1)

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """The right to write there.

        Args:
            resume: Whether the folder may hold a run of the same configuration.

        Raises:
            UsageError: It is neither empty nor such a run, or another process works in it.
        """

        def claim() -> None:
            require(self.path.is_dir() or not self.path.exists(), f"{self.path} is a file, not a folder")
            self.path.mkdir(parents=True, exist_ok=True)
            _check_claim(self.config, self.path, resume)  # nothing is written into the folder of somebody else
            lock.enter_context(RunLock(self.path))
            _check_claim(self.config, self.path, resume)  # another process may have been quicker
            remove_stale(self.path)

        with ExitStack() as lock:
            self.group.on_main(claim)
            yield

    def restore(self, state: TrainState, steps_per_epoch: int) -> list[str]:
        """Restore, on all processes, the state that the run was left in; a sentence for each checkpoint passed over.

        Raises:
            CheckpointError: There are checkpoints, and none can be used.
            UsageError: One was written with other settings.
        """

        contents: list[bytes] = []

        def load() -> list[str]:
            differences = partial(_differences, config=self.config)
            known = load_latest(self.path, state, self._fingerprint, differences, contents.append)
            progress = state.progress
            steps = progress.step - progress.epoch * steps_per_epoch
            if progress.epoch > self.config.epochs or not 0 <= steps <= steps_per_epoch:
                raise CheckpointError(f"{self.path}: step {progress.step} of its checkpoint is not in its epoch")
            return known

        self._fingerprint = fingerprint(state.model, self.train_set)
        problems = self.group.on_main(load)
        if self.group.size > 1:
            if self.group.main and not contents and state.replica is None:
                contents.append(state.to_bytes())
            content = self.group.broadcast(contents[0] if contents else b"")
            if content and not self.group.main:
                state.load_bytes(content, "what process 0 sent")
        self._saved = state.progress.step, state.progress.epoch
        self._write("config.yaml", self.config.to_yaml())
        return problems

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, unless the last one is of this very step and epoch.

        Replacing that one would leave a moment without it, in which a signal may come.
        """
        position = state.progress.step, state.progress.epoch
        if position != self._saved:
            parts = state.parts(keep=self.group.main)
            self.group.on_main(lambda: save_checkpoint(self.path, parts, self._fingerprint, self.config) and None)
            self._saved = position

    def write_metrics(self, rows: list[Row]) -> None:
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_weights(self, state: TrainState) -> None:
        """`model.safetensors`, and `ema.safetensors` and `best.safetensors` where there are such weights."""
        config, data, progress = self.config, self.train_set, state.progress
        description = {
            "model": config.model, "model_options": config.model_options,
            "smooth_activations": config.smooth_activations, "classes": data.classes, "in_shape": data.in_shape,
            "image_size": config.image_size, "eval_crop": config.eval_crop, "data": config.data,
            "method": config.method, "eps": config.eps, "epoch": progress.epoch,
        }  # fmt: skip

        parts = state.parts(keep=self.group.main)

        def save() -> None:
            save_weights(self.path / "model.safetensors", parts["model"], description)
            if parts["average"] is not None:
                save_weights(self.path / "ema.safetensors", parts["average"]["model"], description)
            if progress.best is not None and state.best is not None:
                save_weights(self.path / "best.safetensors", state.best, {**description, **progress.best})

        self.group.on_main(save)

    def write_not_finite(self, step: int, epoch: int, samples: list[int]) -> Path:
        """Write down which samples gave a loss or a gradient that is not finite; returns the path of the file."""
        self._write("not-finite.json", json.dumps({"step": step, "epoch": epoch, "samples": samples}) + "\n")
        return self.path / "not-finite.json"

    def write_results(self, state: TrainState, accuracies: dict[str, dict[str, Any]], test_set: Images) -> None:
        config = self.config
        samples = min(config.eval_samples or len(test_set), len(test_set))
        attack = {"name": f"PGD-{config.pgd_steps}", "norm": "linf", "eps": config.eps, "samples": samples}
        record = {"attack": attack, "overfitting_stopped": state.progress.ended, "weights": accuracies}
        self._write("results.json", json.dumps(record, indent=2) + "\n")

    def draw(self, state: TrainState, test_set: Images) -> None:
        """`curves.png` and `gradients.png`."""

        def figures() -> None:
            from . import figures

            method = self.config.method
            figures.curves(self.path / "curves.png", {method: state.progress.rows}, self.config.eps)
            few = test_set if isinstance(test_set, Dataset) else test_set.first(_DRAWN_FROM).in_memory()
            figures.gradients(self.path / "gradients.png", few, {method: state.model})

        self.group.on_main(figures)

    def _write(self, name: str, content: str) -> None:
        self.group.on_main(lambda: write_atomically(self.path / name, content))


def _check_claim(config: TrainingConfig, out: Path, resume: bool) -> None:
    """Refuse a folder whose run is not the one to be started or resumed."""
    path = out / "config.yaml"
    names = names_in(out)
    if path.name not in names:
        old = "config.json" in names
        require(not old, f"{out} holds a run of an earlier version, with a config.json: choose another --out")
        lost = f"{out} holds checkpoints, but not their config.yaml: put it back, or choose another --out"
        require(not manifests(out), lost)
        for name in names:
            raise UsageError(f"{out} is neither empty nor a run, it holds {brief(name)}: choose another --out")
        return
    require(resume, f"{out} already holds a run: pass --resume to go on with it, or another --out")
    if changed := _differences(read_config(out), config):
        raise UsageError(f"{path} was written with other settings: {', '.join(changed)}; start anew with another --out")
    if not manifests(out) and (weights := [name for name in names if name.endswith(".safetensors")]):
        raise UsageError(f"{out} holds {weights[0]}, but no checkpoint to go on from: choose another --out")


def _differences(written: TrainingConfig, config: TrainingConfig) -> list[str]:
    """What differs between two configurations, where options that are left out count as their defaults."""
    return _completed(written).differences(_completed(config))


def _completed(config: TrainingConfig) -> TrainingConfig:
    """The configuration with the options that it leaves out, such as those that are newer than the run."""
    defaults = METHODS[config.method].options if config.method in METHODS else {}
    return replace(config, options={**defaults, **config.options})


def read_config(out: str | Path) -> TrainingConfig:
    """The configuration of a run directory.

    >>> import tempfile
    >>> from robustkern.training import read_config, recipe, train
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = train(recipe("digits", epochs=1, train_samples=64, eval_samples=10), f"{folder}/run", draw=False)
    ...     print(read_config(f"{folder}/run").epochs)
    1
    """
    path = Path(out) / "config.yaml"
    with naming(path):
        return TrainingConfig.from_yaml(read_bytes(path, 4 * MOST_BYTES).decode())
