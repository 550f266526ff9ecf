"""What a study consists of: kinds of models, and how each is trained."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustkern._settings import THREADS, check_ranges, counts, setting
from robustkern.training import METHODS, TrainingConfig, UsageError, recipe
from robustkern.training.errors import require

PAPER = ("standard", "label-smoothing", "distillation", "fgsm", "pgd", "trades", "gradient-penalty", "fisher")
OURS = ("jacobian", "cross-lipschitz", "gradient-penalty-l2", "gradient-penalty-linf", "llr", "cure")
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0)  # multiples of the recipe's weight
# (oriented, smooth): the entry in that cell
TWO_BY_TWO = {
    (False, False): "gradient-penalty x 0, labels shuffled",
    (False, True): "gradient-penalty, labels shuffled",
    (True, False): "gradient-penalty x 0",
    (True, True): "gradient-penalty",
}
# Norms of the gradient, and the factor on the weight of the recipe, whose norm is L1, that makes the penalty about as
# large: the L1 norm of a Gaussian vector of 784 entries is 22 times its L2 norm and 190 times its largest entry; for
# 64 entries, 6 and 20 times.
_OTHER_NORMS = {"gradient-penalty-l2": (2.0, 20.0), "gradient-penalty-linf": (float("inf"), 200.0)}
_OF_ENTRIES = 784


@dataclass(frozen=True)
class Entry:
    """One kind of model of a study.

    Attributes:
        name: Its name in tables and folders.
        method: A name of `robustkern.training.METHODS`; empty for a given network.
        options: Options of the method, in place of the recipe's.
        shuffled: Whether it is trained on shuffled labels, so that there is no orientation to learn.
        factor: Factor on the recipe's smoothness weight; None: none. For norms other than L1, it is for images with
            784 entries.
        swept: Whether it belongs to the sweep rather than the matrix.
        source: Source of a given network, see `robustkern.study.given.load_given`.
    """

    name: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    shuffled: bool = False
    factor: float | None = None
    swept: bool = False
    source: str = ""


@dataclass(frozen=True)
class Plan:
    """What a study consists of.

    Attributes:
        data: A name of `robustkern.data.NAMES`.
        methods: Names from `PAPER` and `OURS`: the matrix.
        given: Name and source of networks that are measured as they are: beside the matrix, or, under the name of a
            method, in its place.
        seeds: Models of each kind.
        sweep: Multiples of the gradient penalty's weight; empty for none.
        two_by_two: Train on shuffled labels as well.
        samples: Test images that are measured.
        epochs: Epochs of each training; None: half the recipe's, after which every method has shown what it does.
        threads: CPU threads of each training.
        device: "cpu" or "cuda".

    >>> from robustkern.study import Plan
    >>> Plan(data="digits", methods=("standard", "pgd"), seeds=1).sweep
    (0.03, 0.1, 0.3, 1.0, 3.0)
    """

    data: str = "digits-28"
    methods: tuple[str, ...] = PAPER + OURS
    given: tuple[tuple[str, str], ...] = ()
    seeds: int = setting(3, counts(1, 1000))
    sweep: tuple[float, ...] = SWEEP
    two_by_two: bool = True
    samples: int = setting(200, counts())
    epochs: int | None = setting(None, counts())
    threads: int = setting(1, THREADS)
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = ", ".join(PAPER + OURS)
        for method in self.methods:
            require(method in PAPER + OURS, f"no method {method!r} in the study: choose among {known}")
        if self.epochs is None:
            object.__setattr__(self, "epochs", max(1, recipe(self.data).epochs // 2))
        check_ranges(self, UsageError)
        positive = all(0 < factor < math.inf for factor in self.sweep)
        require(positive, f"sweep: multiples must be positive numbers, got {list(self.sweep)}")
        object.__setattr__(self, "sweep", tuple(dict.fromkeys(self.sweep)))

    @property
    def eps(self) -> float:
        """Radius of attacks and penalties."""
        return recipe(self.data).eps

    @property
    def matrix(self) -> list[str]:
        """Names of every method and every given network, without the sweep and the 2x2."""
        return [entry.name for entry in self.entries() if not entry.shuffled and not entry.swept]

    def entries(self) -> list[Entry]:
        """Every kind of model, the matrix first."""
        needed = {"gradient-penalty"} if self.two_by_two or self.sweep else set()
        given = {name: Entry(name, "", source=source) for name, source in self.given}
        require(len(given) == len(self.given), "two of the networks that are given have the same name")
        require(
            not needed & set(given),
            "the sweep and the 2x2 train the gradient penalty themselves: give yours another name, or leave them out "
            "with --sweep none --no-two-by-two",
        )
        found = [
            given.pop(method) if method in given else _entry(method)
            for method in PAPER + OURS
            if method in self.methods or method in needed
        ]
        found += given.values()
        if needed:
            found.append(self._without_penalty())
        found += [
            Entry(f"gradient-penalty x {factor:g}", "gradient-penalty", factor=factor, swept=True)
            for factor in self.sweep
            if factor != 1.0
        ]
        if self.two_by_two:
            found.append(self._without_penalty(shuffled=True))
            found.append(Entry("gradient-penalty, labels shuffled", "gradient-penalty", shuffled=True))
        require(bool(found), "nothing to study: neither methods, a sweep, the 2x2 nor a network that is given")
        folders = [folder_name(entry.name, 0) for entry in found]
        for name in (entry.name for entry, folder in zip(found, folders) if folders.count(folder) > 1):
            raise UsageError(f"{name!r} would share its files with another network of the study: choose another name")
        return found

    def _without_penalty(self, shuffled: bool = False) -> Entry:
        """The gradient penalty's own orientation term, and nothing else."""
        smoothing = recipe(self.data, "gradient-penalty").options["label_smoothing"]
        name = "gradient-penalty x 0" + (", labels shuffled" if shuffled else "")
        return Entry(name, "standard", (("label_smoothing", smoothing),), shuffled, swept=not shuffled)


def configuration(plan: Plan, entry: Entry, seed: int, folder: Path, in_shape: tuple[int, int, int]) -> TrainingConfig:
    """How a model of the study is trained, on images of this shape."""
    options = dict(entry.options)
    if "teacher" in METHODS[entry.method].options:
        options["teacher"] = str(teacher_folder(folder, seed).resolve())
    config = recipe(
        plan.data, entry.method, seed=seed, options=options, shuffle_labels=entry.shuffled, **training_settings(plan)
    )
    if entry.factor:
        factor = entry.factor * (math.prod(in_shape) / _OF_ENTRIES) ** (1 - 1 / config.options["norm"])
        weight = config.options["weight"] * factor
        config = dataclasses.replace(config, options={**config.options, "weight": weight})
    return config


def _entry(method: str) -> Entry:
    if method in _OTHER_NORMS:
        norm, factor = _OTHER_NORMS[method]
        return Entry(method, "gradient-penalty", (("norm", norm),), factor=factor)
    return Entry(method, method)


def training_settings(plan: Plan) -> dict[str, Any]:
    """What all trainings of a study share."""
    return {"threads": plan.threads, "device": plan.device, "eval_every": 10**6, "epochs": plan.epochs}


def folder_name(name: str, seed: int) -> str:
    """The folder of one model."""
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def teacher_folder(folder: Path, seed: int) -> Path:
    """The folder of the network that distillation learns from."""
    return folder / "models" / folder_name("distillation-teacher", seed)
