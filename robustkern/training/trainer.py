"""The training loop: a run directory in, a trained model and its record out.

The run keeps no random state. Initial weights are a function of the seed, the order of the samples and their
augmentation of (seed, epoch), the attack's starts of (seed, batch), what losses draw of (seed, step, place in the
batch), the learning rate and the smoothness weight of the step. What a checkpoint holds, weights, their average,
optimizer buffers and counters, is therefore everything: on one CPU, with one thread count, a run that was killed and
resumed ends with the same bits as one that was not. Nor does any of it depend on the number of processes, which share
each batch: their results differ by rounding, but for BatchNorm, which normalises by each process's part.
"""

import copy
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from robustkern import data as datasets
from robustkern import models
from robustkern.data import Images
from robustkern.distributed import shard_model
from robustkern.sharding import Shard

from .averaging import WeightAverage
from .batches import batches, check_batches, main_size
from .checkpoint import Progress, Row, TrainState
from .config import TrainingConfig
from .distributed import Group, process_group
from .environment import deterministic, threads
from .errors import Interrupted, TrainingError, UsageError, require
from .feed import Feed
from .initial import ModelSpec, initial_model
from .methods import build_loss, check_options
from .observer import Observer
from .optimizers import optimizer_of
from .recomputation import recompute_blocks
from .run_folder import RunFolder
from .signals import StopOnSignal
from .step import Outcome, Stepper, Taken
from .validation import Validation, split

Sets = tuple[Images, Images | None, Images]  # to train on, held out for validation, to test on
_SUMS = ("samples", "penalised", "steps", "orientation", "smoothness", "seconds", "skipped")


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: The run directory.
        model: The trained model, in eval mode.
        rows: One row of metrics per epoch.
        accuracies: Of "last", and of "ema" and "best" where the run has them: clean and robust accuracy on test images,
            and where they come from.  As in `results.json`.

    >>> import tempfile
    >>> from robustkern.training import recipe, train
    >>> config = recipe("digits", epochs=1, train_samples=64, eval_samples=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = train(config, f"{folder}/run", draw=False)
    >>> result.rows[0]["epoch"], result.model.training
    (1, False)
    """

    out: Path
    model: nn.Module
    rows: list[Row]
    accuracies: dict[str, dict[str, Any]]


def train(
    config: TrainingConfig,
    out: str | Path,
    *,
    root: str | Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    timeout: float = 600.0,
    draw: bool = True,
    workers: int = 0,
    shard: bool = False,
) -> Result:
    """Train a model, or finish training it.

    Writes into `out`, each file atomically: `config.yaml`, `metrics.jsonl`, `results.json`, `model.safetensors` (and
    `ema.safetensors`, `best.safetensors`), the last two checkpoints, `curves.png` and `gradients.png`.

    Started by torchrun, or with torch.distributed initialised, the processes share every batch and the evaluation;
    all of them get the result, the first one writes.

    Args:
        config: What to train.
        out: The run directory, empty or a run to go on with; made if missing. Only the first process's counts.
        root: Where the files of the data set are, on each machine.
        resume: Go on with the run in `out`, which must have the same configuration. Without one there, start. The
            number of processes may be another one.
        observer: Told how the run goes.
        timeout: Seconds after which the others give up on a process that does not answer.
        draw: Write `curves.png` and `gradients.png` as well.
        workers: Processes that read images, beside each process of the run, where a data set is read while it is used.
            They change no bit.
        shard: Divide weights, gradients, their average and the optimizer's buffers among the processes, by FSDP2. A run
            can be resumed with it or without.

    Raises:
        UsageError: The configuration makes no sense, differs from the run's or from its checkpoints', `out` is neither
            empty nor a run, or another process works in it.
        DataError: The data set is missing or damaged.
        TrainingError: Losses stay non-finite, nothing can be saved, or another process of the run ended.
        Interrupted: SIGINT or SIGTERM, sent to any of the processes; the state was saved.

    >>> import tempfile
    >>> from robustkern.training import recipe, train
    >>> config = recipe("digits", "gradient-penalty", epochs=1, train_samples=64, eval_samples=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = train(config, f"{folder}/run", draw=False)
    >>> len(result.rows)
    1
    """
    with StopOnSignal() as stop, process_group(config.device, timeout) as group:
        require(not shard or (dist.is_available() and dist.is_initialized()), "shard takes several processes: torchrun")
        observer = observer if observer is not None and group.main else Observer()
        theirs = group.broadcast(config)
        group.on_all(lambda: _check_agreement(group, theirs, config))
        # What one machine lacks, a teacher or images, is an error of all, and must not leave a run behind.
        loss = group.on_all(lambda: _prepare(config))
        with threads(config.threads), deterministic(config.device):
            sets = group.on_all(lambda: _load(config, root, group.size, workers))
            pool = group.on_all(lambda: _with_extra(config, sets[0], workers))
            model, problem = group.on_all(lambda: _initial_model(config, sets[0]))
            if problem:
                observer.on_message(problem)
            folder = RunFolder(Path(out), config, group, pool)
            with folder.claimed(resume):
                feed = Feed(config, pool, len(pool) - len(sets[0]))
                run = _Run(config, folder, sets, feed, model, loss, observer, stop, group, shard)
                accuracies = run.finish()
                if draw:
                    folder.draw(run.state, run.test_set)
            return Result(folder.path, run.model, run.progress.rows, accuracies)


def _check_agreement(group: Group, theirs: TrainingConfig, mine: TrainingConfig) -> None:
    changed = theirs.differences(mine)
    if changed:
        raise UsageError(f"process {group.rank} was started with other settings than process 0: {', '.join(changed)}")


def _prepare(config: TrainingConfig) -> Any:
    """Builds the loss; raises whatever can be known to be wrong without the images."""
    if config.data not in datasets.NAMES and not Path(config.data).is_dir():
        known = ", ".join(datasets.NAMES)
        raise UsageError(f"no data set {config.data!r}: it is neither one of {known} nor an existing folder")
    try:
        models.check_name(config.model, config.model_options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: PyTorch sees no CUDA device here")
    loss = build_loss(config.method, config.options, eps=config.eps, impl=config.impl)
    if (config.mixup or config.cutmix) and not getattr(loss, "soft", True):
        raise UsageError(f"mixup and cutmix mix labels, which method {config.method} cannot take")
    return loss


def _load(config: TrainingConfig, root: str | Path | None, processes: int, workers: int) -> Sets:
    train_set, test_set = _both(config, root, workers)
    train_set = train_set.first(config.train_samples or None)
    if config.shuffle_labels:
        train_set = train_set.with_shuffled_labels(config.seed)
    if not len(train_set) or not len(test_set):
        raise datasets.DataError(f"{config.data}: no images to train or test on")
    if train_set.in_shape != test_set.in_shape:
        shapes = f"[C, H, W] are {list(train_set.in_shape)}, but those to test on {list(test_set.in_shape)}"
        raise datasets.DataError(f"{config.data}: images to train on {shapes}")
    check_options(config.method, config.options, train_set)
    train_set, validation_set = split(train_set, config.validation, config.seed)
    check_batches(config, train_set, processes)
    return train_set, validation_set, test_set


def _both(config: TrainingConfig, root: str | Path | None, workers: int) -> tuple[Images, Images]:
    if config.view is None:
        return datasets.load(config.data, root, "train"), datasets.load(config.data, root, "test")
    train_set = datasets.stream(config.data, config.view, root, "train", workers=workers)
    channels = train_set.channels
    return train_set, datasets.stream(config.data, config.view, root, "test", channels=channels, workers=workers)


def _with_extra(config: TrainingConfig, train_set: Images, workers: int) -> Images:
    """The training set with the extra samples behind it, if there are such."""
    if not config.extra:
        return train_set
    if config.view is None:
        return datasets.join(train_set, datasets.load(config.extra))
    channels = train_set.in_shape[0]
    return datasets.join(train_set, datasets.stream(config.extra, config.view, channels=channels, workers=workers))


def _initial_model(config: TrainingConfig, data: Images) -> tuple[nn.Module, str]:
    """The model, a function of the configuration; and a sentence about weights that do not fit it."""
    spec = ModelSpec(
        config.model, config.model_options, config.init, config.smooth_activations, config.data_mean, config.data_std
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return initial_model(spec, data)


class _Run:
    """One run in progress: a loop over epochs and steps."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        sets: Sets,
        feed: Feed,
        model: nn.Module,
        loss: Any,
        observer: Observer,
        stop: StopOnSignal,
        group: Group,
        shard: bool,
    ) -> None:
        self.config, self.folder, self.observer, self.stop, self.group = config, folder, observer, stop, group
        self.train_set, validation_set, self.test_set = sets
        self.feed = feed
        self.steps_per_epoch = len(batches(len(self.train_set), main_size(config)))
        self.steps = self.steps_per_epoch * config.epochs
        self.stopping = False  # agreed upon by all processes, unlike `stop`
        if config.sync_batch_norm and group.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.recompute:
            recompute_blocks(model)
        self.model = model.to(config.device)
        average = WeightAverage(self.model, config.ema) if config.ema else None
        replica = copy.deepcopy(self.model).cpu() if shard else None
        if shard:
            with group.contact():
                for network in (self.model, *(() if average is None else (average.model,))):
                    shard_model(network)
        optimizer = optimizer_of(config, self.model)
        self.stepper = Stepper(config, self.model, optimizer, loss, group)
        self.open: tuple[Taken, Tensor, int] | None = None  # the step whose outcome is not known yet
        progress = Progress(step=0, epoch=0, skipped=0, sums=dict.fromkeys(_SUMS, 0.0), rows=[])
        self.state = TrainState(progress, self.model, optimizer, average, replica=replica)
        self.validation = Validation(config, self.state, self.test_set, validation_set, group, self._on_evaluation)
        for problem in folder.restore(self.state, self.steps_per_epoch):
            observer.on_message(f"{problem}; going back to the one before it")

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def finish(self) -> dict[str, dict[str, Any]]:
        """Train to the end, and write down the results; returns the accuracies of the weights on test images."""
        # Rows that a killed process wrote after its last checkpoint are not part of the run.
        self.folder.write_metrics(self.progress.rows)
        self.observer.on_start(self.config, self.steps_per_epoch, self.progress)
        try:
            while self.progress.epoch < self.config.epochs and not self.progress.ended:
                self._train_epoch()
                self._end_epoch()
            self._agree_on_stopping()
            self._check_stop()
            self._check_learnt()
            accuracies = self.validation.final()
        except Interrupted:
            self._settle()
            self.folder.save(self.state)
            raise
        finally:
            self.feed.close()
            self.observer.on_end()
            self.stepper.close()
        self.folder.write_weights(self.state)
        self.model = self.state.undivided(self.model).eval()
        self.state.model = self.model
        self.folder.write_results(self.state, accuracies, self.test_set)
        return accuracies

    def _train_epoch(self) -> None:
        progress = self.progress
        self.model.train()
        first = progress.step - progress.epoch * self.steps_per_epoch
        samples = self.feed.epoch(progress.epoch, self.group.rank, self.group.size, first)
        for step in range(first, self.steps_per_epoch):
            self._check_stop()
            indices = samples[step]
            started = time.perf_counter()
            self._step(indices)
            progress.sums["seconds"] += time.perf_counter() - started
            progress.sums["steps"] += 1
            progress.step += 1
            self.observer.on_step(progress)
            if self.config.checkpoint_every and progress.step % self.config.checkpoint_every == 0:
                self._settle()
                self.folder.save(self.state)
        self._settle()

    def _step(self, indices: Tensor) -> None:
        shard = Shard.of(self.group.rank, self.group.size, len(indices))
        step = self.progress.step
        x, y = self.feed.batch(indices, shard, self.progress.epoch, step)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        asked = self.stop.signal is not None
        taken = self.stepper.start(x, y, shard, step, self.steps, stop=asked, before_update=self._settle)
        self.open = (taken, indices, step)
        if not self.stepper.late:
            self._settle()

    def _settle(self) -> None:
        """Writes down what came of the last step, unless it is done already."""
        if self.open is None:
            return
        (taken, indices, step), self.open = self.open, None
        outcome = taken.outcome()
        self.stopping = outcome.stop
        if not outcome.finite:
            self._skip(indices, step)
            return
        if self.state.average is not None:
            self.state.average.update(self.model)
        self._count(outcome, len(indices))

    def _count(self, outcome: Outcome, samples: int) -> None:
        progress = self.progress
        progress.skipped = 0
        progress.sums["samples"] += samples
        progress.sums["orientation"] += samples * outcome.orientation
        if outcome.smoothness is not None:
            progress.sums["penalised"] += samples
            progress.sums["smoothness"] += samples * outcome.smoothness

    def _skip(self, indices: Tensor, step: int) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.sums["skipped"] += 1
        if progress.skipped > self.config.max_skipped:
            path = self.folder.write_not_finite(step + 1, progress.epoch + 1, indices.tolist())
            raise TrainingError(
                f"the loss or its gradient was not finite {progress.skipped} steps in a row (the last is step "
                f"{step + 1}, {path} has its samples): lower the learning rate or the weight; the last "
                "checkpoint is from before"
            )

    def _end_epoch(self) -> None:
        progress, sums = self.progress, self.progress.sums
        row: Row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "learning_rate": self.stepper.learning_rate(progress.step - 1, self.steps),
            "orientation": _mean(sums["orientation"], sums["samples"]),
            "smoothness": _mean(sums["smoothness"], sums["penalised"]),
            "clean_accuracy": None,
            "robust_accuracy": None,
            "ms_per_step": 1e3 * sums["seconds"] / max(1.0, sums["steps"]),
            "skipped": sums["skipped"],
        }
        warning = self.validation.epoch(row)
        progress.rows.append(row)
        progress.epoch += 1
        progress.sums = dict.fromkeys(_SUMS, 0.0)
        self.folder.save(self.state)
        self.folder.write_metrics(progress.rows)
        self.folder.write_weights(self.state)
        self.observer.on_epoch(row)
        if warning is not None:
            self.observer.on_message(warning)

    def _on_evaluation(self) -> None:
        self._agree_on_stopping()
        self._check_stop()
        self.observer.on_evaluation()

    def _agree_on_stopping(self) -> None:
        self.stopping = self.group.sum(float(self.stop.signal is not None)) > 0

    def _check_stop(self) -> None:
        if self.stopping or (self.group.size == 1 and self.stop.signal is not None):
            name = "a signal to another process" if self.stop.signal is None else signal.Signals(self.stop.signal).name
            raise Interrupted(f"stopped by {name} after step {self.progress.step}")

    def _check_learnt(self) -> None:
        progress = self.progress
        if sum(row["skipped"] or 0 for row in progress.rows) == progress.step:
            raise TrainingError(
                f"nothing was learnt: the loss or its gradient was not finite in any of the {progress.step} steps, so "
                "that the weights are those of the beginning: lower the learning rate or the weight"
            )


def _mean(total: float, count: float) -> float | None:
    """None where nothing was measured."""
    return total / count if count else None
