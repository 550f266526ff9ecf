"""The settings of an evaluation, and its results."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robustkern._choices import THREATS, Threat
from robustkern._settings import RADII, SEEDS, Range, check_ranges, counts, setting

from .checks import Check
from .intervals import wilson_interval

ATTACKS = ("pgd", "apgd", "autoattack")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        eps: Radius of the ball, in units of the images.
        norm: "linf" or "l2".
        samples: The first N test images; 0: all.
        attacks: Names from `ATTACKS`: "pgd" (PGD on the cross-entropy), "apgd" (APGD on the cross-entropy and,
            targeted, on the difference of logits ratio), "autoattack" (AutoAttack standard, as the package pyautoattack
            has it).
        pgd_steps: Steps of PGD. Each is eps / 4 long.
        restarts: Random starts of PGD.
        apgd_steps: Steps of APGD.
        check_samples: Images that the checks attack. They are the first, and are attacked a few dozen times.
        batch_size: Images at a time.
        seed: Seed of everything random.

    >>> from robustkern.evaluation import Settings
    >>> Settings(eps=8 / 255, attacks=("pgd",)).restarts
    10
    """

    eps: float = setting(valid=Range(0, open="()"))
    norm: Threat = "linf"
    samples: int = setting(1000, counts(0))
    attacks: tuple[str, ...] = ATTACKS
    pgd_steps: int = setting(50, counts())
    restarts: int = setting(10, counts())
    apgd_steps: int = setting(100, counts())
    check_samples: int = setting(200, counts())
    batch_size: int = setting(250, counts())
    seed: int = setting(0, SEEDS)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        if self.norm not in THREATS:
            raise ValueError(f"norm must be one of {', '.join(THREATS)}, got {self.norm!r}")
        if self.norm == "linf" and self.eps not in RADII:
            raise ValueError(f"eps must be {RADII}, got {self.eps}")
        for attack in self.attacks:
            if attack not in ATTACKS:
                raise ValueError(f"no attack {attack!r}: choose among {', '.join(ATTACKS)}")


@dataclass(frozen=True)
class Accuracy:
    """An accuracy with its 95 % Wilson interval.

    Attributes:
        name: What it is the accuracy of.
        right: Samples classified right.
        samples: Samples in all.
        seconds: How long it took to measure.

    >>> from robustkern.evaluation import Accuracy
    >>> Accuracy("clean", right=90, samples=100).value
    0.9
    """

    name: str
    right: int
    samples: int
    seconds: float = 0.0

    @classmethod
    def of(cls, name: str, right: Tensor, started: float | None = None) -> Accuracy:
        """The share for which `right` [B] is true; `started` is what time.perf_counter() gave before."""
        count = int(right.sum())  # waits for a GPU before the clock is read
        return cls(name, count, len(right), 0.0 if started is None else time.perf_counter() - started)

    @property
    def value(self) -> float:
        return self.right / max(1, self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.samples)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "name": self.name, "accuracy": self.value, "low": low, "high": high, "right": self.right,
            "samples": self.samples, "seconds": round(self.seconds, 2),
        }  # fmt: skip


@dataclass
class Report:
    """What was found.

    Attributes:
        settings: What was measured.
        clean: Accuracy on the images as they are.
        attacks: Accuracy under each attack.
        worst: Accuracy where a sample counts as right only if no attack fools the model on it.
        classes: Names of the classes.
        per_class: Clean and worst accuracy of each class.
        curve: Accuracy under PGD-20 against the radius, on the first 500 samples.
        steepness: Mean and quartiles of measures of slope and margin; none of them is an accuracy, and the Lipschitz
            constant is what an attack found: a lower bound.
        checks: Outcomes of the checks, which look for reasons to doubt the accuracies.
        unchecked: Why nothing was checked; empty if something was.
        warnings: Warnings of the attacks' packages.
        adversaries: For each attack, its adversarial images.  [N, C, H, W]
        x: The clean images.
        y: Their labels.
        identity: Name of this evaluation, in each of its files, which tells those of two evaluations apart.

    >>> from robustkern.evaluation import Settings, evaluate
    >>> from robustkern.data import load
    >>> from robustkern.models import create
    >>> settings = Settings(0.1, samples=20, attacks=("pgd",), pgd_steps=2, restarts=1, check_samples=5)
    >>> report = evaluate(create("small-cnn", 10, (1, 8, 8)), load("digits", split="test"), settings)
    >>> [attack.name for attack in report.attacks], report.worst.samples
    (['PGD-2x1'], 20)
    """

    settings: Settings
    clean: Accuracy
    classes: tuple[str, ...]
    x: Tensor
    y: Tensor
    attacks: list[Accuracy] = field(default_factory=list)
    worst: Accuracy | None = None
    per_class: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    steepness: dict[str, dict[str, float | None]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    unchecked: str = ""
    warnings: list[str] = field(default_factory=list)
    adversaries: dict[str, Tensor] = field(default_factory=dict)
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def sound(self) -> bool:
        """Whether the accuracies were checked, and no check found a reason to doubt them."""
        return not self.unchecked and all(check.passed for check in self.checks)

    @property
    def with_images(self) -> list[dict[str, Any]]:
        """The entries of `per_class` whose class occurs."""
        return [row for row in self.per_class if row["clean"]["samples"]]
