"""The training loop: a run directory in, a trained model and its record out.

The run keeps no random state. Initial weights are a function of the seed, the order of the samples and their
augmentation of (seed, epoch), the attack's starts of (seed, batch), random projections of (seed, step), the learning
rate and the smoothness weight of the step. What a checkpoint holds, weights, optimizer buffers and counters, is
therefore everything: on one CPU, with one thread count, a run that was killed and resumed ends with the same bits as
one that was not.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import data as datasets
from robustkern import models
from robustkern.attacks import PGD
from robustkern.losses.projected_penalty import ProjectedPenalty

from .checkpoint import Progress, Row, fingerprint, load_latest, save_checkpoint
from .config import TrainingConfig
from .errors import Interrupted, TrainingError, UsageError
from .evaluation import clean_accuracy, robust_accuracy
from .files import RunLock, remove_stale, write_atomically
from .methods import build_loss
from .schedule import learning_rate, weight_factor
from .weights import save_weights

_SUMS = ("samples", "penalised", "steps", "orientation", "smoothness", "seconds", "skipped")


class Observer:
    """What a run tells whoever watches it; override what is of interest."""

    def on_start(self, config: TrainingConfig, steps_per_epoch: int, progress: Progress) -> None:
        """Training begins, or goes on, at `progress`."""

    def on_step(self, progress: Progress) -> None:
        """A step was taken."""

    def on_evaluation(self) -> None:
        """A batch of the evaluation was done."""

    def on_epoch(self, row: Row) -> None:
        """An epoch has ended with these metrics."""

    def on_message(self, message: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: The run directory.
        model: The trained model, in eval mode.
        rows: One row of metrics per epoch.
    """

    out: Path
    model: nn.Module
    rows: list[Row]


def train(
    config: TrainingConfig,
    out: str | Path,
    *,
    root: str | Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> Result:
    """Train a model, or finish training it.

    Writes into `out`, each file atomically: `config.json`, `metrics.jsonl`, `model.safetensors`, the last two
    checkpoints, `curves.png` and `gradients.png`.

    Args:
        config: What to train.
        out: The run directory; made if missing.
        root: Where the files of the data set are.
        resume: Go on with the run in `out`, which must have the same configuration. Without one there, start.
        observer: Is told how the run goes.

    Raises:
        UsageError: The configuration makes no sense, differs from the run's, or another process works in `out`.
        DataError: The data set is missing or damaged.
        TrainingError: Losses stay non-finite, or nothing can be saved.
        Interrupted: SIGINT or SIGTERM; the state was saved.
    """
    out = Path(out)
    observer = observer or Observer()
    loss = build_loss(config.method, config.options, eps=config.eps, impl=config.impl)
    if config.data not in datasets.NAMES and not Path(config.data).is_dir():
        known = ", ".join(datasets.NAMES)
        raise UsageError(f"no data set {config.data!r}: it is neither one of {known} nor an existing folder")
    if config.model not in models.MODELS:
        raise UsageError(f"no model {config.model!r}: choose one of {', '.join(models.MODELS)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: PyTorch sees no CUDA device here")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out), _threads(config.threads), _StopOnSignal() as stop:
        remove_stale(out)
        _check_claim(config, out, resume)
        train_set = datasets.load(config.data, root, "train").first(config.train_samples or None)
        test_set = datasets.load(config.data, root, "test")
        # Only now: a data set that was missing must not leave a run behind.
        write_atomically(out / "config.json", config.to_json())
        run = _Run(config, out, train_set, test_set, loss, observer, stop)
        return run.finish()


def _check_claim(config: TrainingConfig, out: Path, resume: bool) -> None:
    """Refuse a folder whose run is not the one to be started or resumed."""
    path = out / "config.json"
    if not path.exists():
        return
    if not resume:
        raise UsageError(f"{out} already holds a run: pass --resume to go on with it, or another --out")
    changed = read_config(out).differences(config)
    if changed:
        raise UsageError(f"{path} was written with other settings: {', '.join(changed)}; start anew with another --out")


def read_config(out: str | Path) -> TrainingConfig:
    """The configuration of a run directory."""
    path = Path(out) / "config.json"
    try:
        return TrainingConfig.from_json(path.read_text())
    except (OSError, UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error


class _Run:
    """One run in progress."""

    def __init__(
        self,
        config: TrainingConfig,
        out: Path,
        train_set: datasets.Dataset,
        test_set: datasets.Dataset,
        loss: Any,
        observer: Observer,
        stop: _StopOnSignal,
    ) -> None:
        if not len(train_set) or not len(test_set):
            raise datasets.DataError(f"{config.data}: no images to train or test on")
        self.config, self.out, self.observer, self.stop = config, out, observer, stop
        self.train_set, self.test_set, self.loss = train_set, test_set, loss
        self.steps_per_epoch = -(-len(train_set) // config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.augmentation = datasets.augmentation(config.data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = models.create(config.model, train_set.num_classes, train_set.in_shape, *train_set.statistics())
        self.model.to(config.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(config, self.parameters)
        self.fingerprint = fingerprint(self.model, train_set.classes)
        loaded, problems = load_latest(out, self.model, self.optimizer, self.fingerprint)
        for problem in problems:
            observer.on_message(f"{problem}; going back to the one before it")
        self.progress = loaded or Progress(step=0, epoch=0, skipped=0, sums=dict.fromkeys(_SUMS, 0.0), rows=[])

    def finish(self) -> Result:
        self._write_metrics()  # rows that a killed process wrote after its last checkpoint are not part of the run
        self.observer.on_start(self.config, self.steps_per_epoch, self.progress)
        try:
            while self.progress.epoch < self.config.epochs:
                self._train_epoch()
                self._end_epoch()
            self._check_stop()
        except Interrupted:
            self._save()
            raise
        self._save_weights()
        self.model.eval()
        self._draw()
        return Result(self.out, self.model, self.progress.rows)

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        order = datasets.epoch_order(config.seed, progress.epoch, len(self.train_set))
        self.model.train()
        for step in range(progress.step - progress.epoch * self.steps_per_epoch, self.steps_per_epoch):
            self._check_stop()
            indices = order[step * config.batch_size : (step + 1) * config.batch_size]
            started = time.perf_counter()
            self._step(*self._batch(indices))
            progress.sums["seconds"] += time.perf_counter() - started
            progress.sums["steps"] += 1
            progress.step += 1
            self.observer.on_step(progress)
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                self._save()

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.train_set.images[indices], self.train_set.labels[indices]
        if self.augmentation is not None:
            seed, epoch = self.config.seed, self.progress.epoch
            x = self.augmentation(x, indices, seed=seed, epoch=epoch, count=len(self.train_set))
        return x.to(self.config.device), y.to(self.config.device)

    def _step(self, x: Tensor, y: Tensor) -> None:
        config, progress = self.config, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.lr, progress.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.loss, ProjectedPenalty):
            self.loss.step, self.loss.generator = progress.step, self._draws()
        terms = self.loss(self.model, x, y)
        penalised = terms.weight != 0 or not isinstance(self.loss, ProjectedPenalty)
        terms = terms._replace(weight=terms.weight * weight_factor(config.ramp, progress.step, self.steps))
        terms.backward(inputs=self.parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # Both: a finite loss can have a NaN gradient, and clipping by a NaN norm makes every weight NaN.
        if not bool((terms.total.isfinite() & norm.isfinite()).item()):
            self._skip()
            return
        if config.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip, norm)
        self.optimizer.step()
        progress.skipped = 0
        progress.sums["samples"] += len(y)
        progress.sums["orientation"] += len(y) * terms.orientation.item()
        if penalised:
            progress.sums["penalised"] += len(y)
            progress.sums["smoothness"] += len(y) * terms.smoothness.item()

    def _draws(self) -> torch.Generator:
        """The random numbers of this step, on the device of the batch."""
        draws = datasets.generator(self.config.seed, "projections", self.progress.step)
        if self.config.device == "cpu":
            return draws
        return torch.Generator(self.config.device).manual_seed(draws.initial_seed())

    def _skip(self) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.sums["skipped"] += 1
        if progress.skipped > self.config.max_skipped:
            raise TrainingError(
                f"the loss or its gradient was not finite {progress.skipped} steps in a row (the last is step "
                f"{progress.step + 1}): lower the learning rate or the weight; the weights before it are saved"
            )

    def _end_epoch(self) -> None:
        config, progress, sums = self.config, self.progress, self.progress.sums
        samples = max(1.0, sums["samples"])
        attack = PGD(config.eps, steps=config.pgd_steps)
        clean = clean_accuracy(self.model, self.test_set, device=config.device, on_batch=self._on_evaluation)
        robust = None
        if (progress.epoch + 1) % config.eval_every == 0 or progress.epoch + 1 == config.epochs:
            robust = robust_accuracy(
                self.model,
                self.test_set.first(config.eval_samples or None),
                attack,
                seed=config.seed,
                device=config.device,
                on_batch=self._on_evaluation,
            )
        row: Row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "orientation": sums["orientation"] / samples,
            "smoothness": sums["smoothness"] / max(1.0, sums["penalised"]),
            "clean_accuracy": clean,
            "robust_accuracy": robust,
            "ms_per_step": 1e3 * sums["seconds"] / max(1.0, sums["steps"]),
            "skipped": sums["skipped"],
        }
        progress.rows.append(row)
        progress.epoch += 1
        progress.sums = dict.fromkeys(_SUMS, 0.0)
        self._save()
        self._write_metrics()
        self._save_weights()
        self.observer.on_epoch(row)

    def _on_evaluation(self) -> None:
        self._check_stop()
        self.observer.on_evaluation()

    def _check_stop(self) -> None:
        if self.stop.signal is not None:
            name = signal.Signals(self.stop.signal).name
            raise Interrupted(f"stopped by {name} after step {self.progress.step}; --resume goes on from there")

    def _save(self) -> None:
        save_checkpoint(self.out, self.progress, self.model, self.optimizer, self.fingerprint)

    def _save_weights(self) -> None:
        description = {
            "model": self.config.model,
            "classes": self.train_set.classes,
            "in_shape": self.train_set.in_shape,
            "data": self.config.data,
            "method": self.config.method,
            "eps": self.config.eps,
            "epoch": self.progress.epoch,
        }
        save_weights(self.out / "model.safetensors", self.model, description)

    def _write_metrics(self) -> None:
        lines = (json.dumps(row) + "\n" for row in self.progress.rows)
        write_atomically(self.out / "metrics.jsonl", "".join(lines))

    def _draw(self) -> None:
        from . import figures

        figures.curves(self.out / "curves.png", {self.config.method: self.progress.rows}, self.config.eps)
        figures.gradients(self.out / "gradients.png", self.test_set, {self.config.method: self.model})


def _optimizer(config: TrainingConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _StopOnSignal:
    """Remembers that SIGINT or SIGTERM came; the loop looks between two steps. A second one acts as it always does."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        # Only the main thread may set handlers; elsewhere the program that runs us deals with signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
