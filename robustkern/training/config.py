"""The configuration of a run: everything that decides its result, as it is written to `config.yaml`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from robustkern._arguments import RADII, SEEDS, THREADS, Range, counts, shown
from robustkern._text import brief

from .errors import UsageError
from .yaml_files import MOST_BYTES, dump_yaml, load_yaml

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "cosine", "triangular", "step", "constant")
WATCHES = ("warn", "stop", "off")
RANGES = {
    "eps": RADII,
    "epochs": counts(),
    "batch_size": counts(),
    "lr": Range(0, open="()"),
    "weight_decay": Range(0),
    "gamma": Range(0, 1, open="("),
    "ramp": Range(0, 1, open=""),
    "clip": Range(0),
    "ema": Range(0, 1),
    "seed": SEEDS,
    "threads": THREADS,
    "train_samples": counts(0),
    "validation": Range(0),
    "eval_samples": counts(0),
    "eval_every": counts(),
    "pgd_steps": counts(),
    "checkpoint_every": counts(0),
    "max_skipped": counts(0),
}


_PLAIN: dict[str, type] = {"str": str, "bool": bool, "tuple[int, ...]": tuple}


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the result of a run.

    Attributes:
        data: A name of `robustkern.data.NAMES`, or the path of an image folder.
        method: A name of `robustkern.training.METHODS`.
        options: The options of the method; those left out take the method's defaults.
        model: A name of `robustkern.models.MODELS`.
        eps: Radius of the attack that measures robustness, and of methods that need one, in units of the images.
        epochs: Passes over the training set.
        batch_size: Samples per step, those of all processes together; the last, smaller batch of an epoch is trained
            on as well, and a single sample left over joins the batch before.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        lr: Peak learning rate.
        weight_decay: Decoupled for AdamW, L2 for SGD.
        schedule: "one-cycle" (linear rise over the first quarter, then cosine to zero), "cosine", "triangular" (linear
            rise over the first half, linear fall over the second), "step" (times `gamma` at each of the `milestones`)
            or "constant".
        milestones: Epochs after which schedule "step" lowers the learning rate; none: after half and three quarters.
        gamma: What it is multiplied with there.
        ramp: The smoothness weight grows linearly from 0 to full over this share of the steps.
        clip: Largest gradient norm; a longer gradient is scaled down to it. 0: never.
        ema: Decay of an exponential moving average of the weights; 0: none. See `WeightAverage`.
        amp: Forward passes of the loss in bfloat16 where PyTorch's autocast does that; weights, reductions of the
            loss, optimizer and evaluation stay float32.
        sync_batch_norm: With several processes on GPUs, BatchNorm normalises by the whole batch rather than by each
            process's part.
        seed: Decides initial weights, validation split, order of the samples, augmentation and everything random in
            losses and attacks.
        impl: "auto", "kernel" or "reference": which implementation of the fused ops.
        device: "cpu" or "cuda".
        threads: CPU threads. Part of the result, because it decides the order in which sums are taken.
        train_samples: Train on the first so many samples only; 0: all.
        shuffle_labels: Give the training images, those held out for validation among them, each other's labels, by the
            seed: a control, with nothing to learn but the images themselves.
        validation: Training samples held out to choose the best weights by: a share below 1, or a number. 0: none.
        eval_samples: Robust accuracy is measured on the first so many images of the test or validation set; 0: all.
        eval_every: It is measured every so many epochs, and after the last; null in the rows between.
        pgd_steps: Steps of that attack.
        watch: What to do about catastrophic overfitting, see `overfitting`: "warn", "stop" the training (which takes a
            validation set) or "off".
        checkpoint_every: Steps between checkpoints inside an epoch; 0: only at the end of each epoch.
        max_skipped: Steps in a row that may be skipped for a non-finite loss or gradient before the run fails.
    """

    data: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "small-cnn"
    eps: float = 8 / 255
    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    ramp: float = 0.3
    clip: float = 1.0
    ema: float = 0.0
    amp: bool = False
    sync_batch_norm: bool = False
    seed: int = 0
    impl: str = "auto"
    device: str = "cpu"
    threads: int = 1
    train_samples: int = 0
    shuffle_labels: bool = False
    validation: float = 0.0
    eval_samples: int = 1000
    eval_every: int = 1
    pgd_steps: int = 20
    watch: str = "warn"
    checkpoint_every: int = 0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        for name, valid in RANGES.items():
            value = getattr(self, name)
            _require(value in valid, f"{name} must be {valid}, got {shown(value)}")
        for setting in dataclasses.fields(self):
            value, kind = getattr(self, setting.name), _PLAIN.get(str(setting.type), object)
            _require(isinstance(value, kind), f"{setting.name} must be {setting.type}, got {shown(value)}")
        whole = self.validation < 1 or float(self.validation).is_integer()
        _require(whole, f"validation must be a share below 1 or a number of samples, got {self.validation}")
        _require(self.optimizer in OPTIMIZERS, f"no optimizer {self.optimizer!r}: {', '.join(OPTIMIZERS)}")
        _require(self.schedule in SCHEDULES, f"no schedule {self.schedule!r}: {', '.join(SCHEDULES)}")
        bounds = (0, *self.milestones, self.epochs)
        _require(
            not self.milestones or all(a < b for a, b in pairwise(bounds)),
            f"milestones must be ascending epochs from 1 to {self.epochs - 1}, got {list(self.milestones)}",
        )
        only_step = self.schedule == "step" or not self.milestones
        _require(only_step, f"milestones belong to schedule step, got schedule {self.schedule}")
        _require(self.impl in ("auto", "kernel", "reference"), f"impl: auto, kernel or reference, got {self.impl!r}")
        _require(self.device in ("cpu", "cuda"), f"device must be cpu or cuda, got {self.device!r}")
        _require(self.watch in WATCHES, f"watch must be one of {', '.join(WATCHES)}, got {self.watch!r}")
        _require(
            self.watch != "stop" or self.validation > 0,
            "watch stop takes a validation set: no run may end early by what it sees of the test images",
        )
        _require(not self.sync_batch_norm or self.device == "cuda", "sync_batch_norm takes device cuda")

    def to_yaml(self) -> str:
        """What `from_yaml` reads; numbers to their last bit."""
        values = dataclasses.asdict(self)
        return dump_yaml({**values, "milestones": list(self.milestones)})

    @classmethod
    def from_yaml(cls, text: str) -> TrainingConfig:
        """The configuration that `to_yaml` wrote; unknown and missing names, and wrong types, are refused."""
        values = parse_settings(text)
        missing = sorted(name for name in ("data", "method") if name not in values)
        _require(not missing, f"missing setting {', '.join(missing)}")
        return cls(**values)

    def differences(self, other: TrainingConfig) -> list[str]:
        """What differs from another configuration, one readable phrase for each setting."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        changed = []
        for name in mine:
            if name == "options":
                for option in sorted(set(mine[name]) | set(theirs[name])):
                    old, new = mine[name].get(option), theirs[name].get(option)
                    if old != new:
                        changed.append(f"{option} {old} -> {new}")
            elif mine[name] != theirs[name]:
                changed.append(f"{name} {mine[name]} -> {theirs[name]}")
        return changed


# By the name of the type, up to its first bracket.
_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict": dict, "tuple": list}


def parse_settings(text: str) -> dict[str, Any]:
    """Fields of a `TrainingConfig`, or some of them, from YAML; unknown names and wrong types are refused."""
    values = load_yaml(text)
    _require(isinstance(values, dict), f"expected a mapping of settings, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(TrainingConfig)}
    unknown = sorted(str(name) for name in set(values) - set(fields))
    _require(not unknown, f"unknown setting {brief(', '.join(unknown))}")
    for name, value in values.items():
        kind = str(fields[name].type)
        if kind == "float" and isinstance(value, str):
            values[name] = value = parse_fraction(value)
        fits = isinstance(value, _TYPES[kind.split("[")[0]]) and (kind == "bool") == isinstance(value, bool)
        fits = fits and not (isinstance(value, int) and abs(value) >= 1 << 63)
        _require(fits, f"{name} must be {kind}, got {brief(repr(value))}")
    if "milestones" in values:
        numbers = all(type(epoch) is int and abs(epoch) < 1 << 63 for epoch in values["milestones"])
        _require(numbers, f"milestones must be a list of epochs, got {brief(repr(values['milestones']))}")
        values["milestones"] = tuple(values["milestones"])
    options = values.get("options", {})
    for name, value in options.items():
        plain = isinstance(name, str) and (value is None or type(value) in (str, int, float, bool))
        _require(plain, f"options must be names with a number, a text, true or false each, got {brief(repr(options))}")
    return values


def read_settings(path: str | Path) -> dict[str, Any]:
    """`parse_settings` of a file; errors name it."""
    try:
        # Not `read_bytes`: it may be a pipe, as the shell's <(...) is.
        with open(path, "rb") as file:
            return parse_settings(file.read(4 * MOST_BYTES + 1).decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error


def parse_fraction(text: str) -> float:
    """A number written as such (0.1) or as a fraction (8/255)."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{brief(repr(text))} is neither a number nor a fraction such as 8/255") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
