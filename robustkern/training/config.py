"""The configuration of a run: everything that decides its result, as it is written to `config.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "cosine", "constant")


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
        batch_size: Samples per step; the last, smaller batch of an epoch is trained on as well.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        lr: Peak learning rate.
        weight_decay: Decoupled for AdamW, L2 for SGD.
        schedule: "one-cycle" (linear rise over the first quarter, then cosine to zero), "cosine" or "constant".
        ramp: The smoothness weight grows linearly from 0 to full over this share of the steps.
        clip: Largest gradient norm; a longer gradient is scaled down to it. 0: never.
        seed: Decides initial weights, order of the samples, augmentation and random starts of attacks.
        impl: "auto", "kernel" or "reference": which implementation of the fused ops.
        device: "cpu" or "cuda".
        threads: CPU threads. Part of the result, because it decides the order in which sums are taken.
        train_samples: Train on the first so many samples only; 0: all.
        eval_samples: Robust accuracy is measured on the first so many test samples; 0: all.
        eval_every: It is measured every so many epochs, and after the last; null in the rows between.
        pgd_steps: Steps of that attack.
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
    ramp: float = 0.3
    clip: float = 1.0
    seed: int = 0
    impl: str = "auto"
    device: str = "cpu"
    threads: int = 1
    train_samples: int = 0
    eval_samples: int = 1000
    eval_every: int = 1
    pgd_steps: int = 20
    checkpoint_every: int = 0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "pgd_steps", "eval_every", "threads"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("train_samples", "eval_samples", "checkpoint_every", "max_skipped", "weight_decay", "clip"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")
        _require(0 < self.eps <= 1, f"eps must be in (0, 1], got {self.eps}: images are in [0, 1], write 8/255")
        _require(0 <= self.ramp <= 1, f"ramp is a share of the training, 0 to 1, got {self.ramp}")
        _require(self.optimizer in OPTIMIZERS, f"no optimizer {self.optimizer!r}: {', '.join(OPTIMIZERS)}")
        _require(self.schedule in SCHEDULES, f"no schedule {self.schedule!r}: {', '.join(SCHEDULES)}")
        _require(self.impl in ("auto", "kernel", "reference"), f"impl: auto, kernel or reference, got {self.impl!r}")
        _require(self.device in ("cpu", "cuda"), f"device must be cpu or cuda, got {self.device!r}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingConfig:
        """The configuration that `to_json` wrote; unknown and missing names, and wrong types, are refused."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"not JSON ({error})") from error
        if not isinstance(values, dict):
            raise UsageError("not a JSON object")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(name for name in ("data", "method") if name not in values)
        _require(not unknown, f"unknown setting {', '.join(unknown)}")
        _require(not missing, f"missing setting {', '.join(missing)}")
        for name, value in values.items():
            accepted = _TYPES[str(fields[name].type).split("[")[0]]
            fits = isinstance(value, accepted) and not isinstance(value, bool)
            _require(fits, f"{name} must be {fields[name].type}, got {value!r}")
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


_TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict": dict}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
