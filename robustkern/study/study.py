"""What a classifier learns to see: every method trained, measured and drawn, from one command.

The claim under test (Helland and VanHoudnos 2020) is that orientation of the decision boundary and smoothness together
make input gradients recognisable to people, and that either alone does not. A study trains

    the matrix     every method, with the recipe of the data set
    the sweep      the gradient penalty with ever larger weights: recognisability against smoothness
    the 2x2        cross-entropy and the gradient penalty on true and on shuffled labels: orientation with and without
                   smoothness, smoothness with and without orientation

each with several seeds, measures every model by the same protocol, and writes figures and a report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import data as datasets
from robustkern.data import Dataset
from robustkern.training import METHODS, Observer, TrainingConfig, UsageError, load_model, recipe, train
from robustkern.training.files import write_atomically

from .measures import MEASURES, Protocol, measure, summarise

PAPER = ("standard", "label-smoothing", "distillation", "fgsm", "pgd", "trades", "gradient-penalty", "fisher")
OURS = ("jacobian", "cross-lipschitz", "gradient-penalty-l2", "gradient-penalty-linf", "llr", "cure")
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0)  # multiples of the recipe's weight
_JUDGE_SEED = 1000  # of the independent network; no model of the study has it


@dataclass(frozen=True)
class Entry:
    """One kind of model of a study.

    Attributes:
        name: As tables and folders have it.
        method: A name of `robustkern.training.METHODS`.
        options: Of the method, in place of the recipe's.
        shuffled: Trained on labels that were shuffled among the images: no orientation to learn.
        factor: Of the recipe's smoothness weight.
    """

    name: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    shuffled: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What a study consists of.

    Attributes:
        data: A name of `robustkern.data.NAMES`.
        methods: Of `PAPER` and `OURS`: the matrix.
        seeds: Models of each kind.
        sweep: Multiples of the gradient penalty's weight; empty for none.
        two_by_two: Whether shuffled labels are trained on as well.
        samples: Test images that are measured.
        epochs: Of each training; None: the recipe's.
        threads: CPU threads.
        device: "cpu" or "cuda".
    """

    data: str = "digits-28"
    methods: tuple[str, ...] = PAPER + OURS
    seeds: int = 3
    sweep: tuple[float, ...] = SWEEP
    two_by_two: bool = True
    samples: int = 200
    epochs: int | None = None
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in PAPER + OURS:
                raise UsageError(f"no method {method!r} in the study: choose among {', '.join(PAPER + OURS)}")
        if self.seeds < 1:
            raise UsageError(f"seeds must be at least 1, got {self.seeds}")

    def entries(self) -> list[Entry]:
        """Every kind of model, the matrix first, and in it the networks that others learn from."""
        needed = {"standard", "gradient-penalty"} if self.two_by_two or self.sweep else set()
        if "distillation" in self.methods:
            needed.add("standard")
        found = [_entry(method) for method in PAPER + OURS if method in self.methods or method in needed]
        for factor in self.sweep:
            if factor != 1.0:
                found.append(Entry(f"gradient-penalty x {factor:g}", "gradient-penalty", factor=factor))
        if self.two_by_two:
            found.append(Entry("standard, labels shuffled", "standard", shuffled=True))
            found.append(Entry("gradient-penalty, labels shuffled", "gradient-penalty", shuffled=True))
        return found


@dataclass
class Study:
    """A finished study.

    Attributes:
        plan: What it consists of.
        data: Test images.
        summary: For each entry's name, for each measure: mean, low, high over images and seeds, and the number of them.
        terms: For each entry's name, rows of metrics of its first model.
        folder: Where everything lies.
    """

    plan: Plan
    data: Dataset
    summary: dict[str, dict[str, dict[str, Any]]]
    terms: dict[str, list[dict[str, Any]]]
    folder: Path

    def network(self, name: str, seed: int = 0) -> nn.Module:
        """The trained model of an entry."""
        return load_model(self.folder / "models" / _folder(name, seed))[0]


def run(
    plan: Plan,
    folder: Path,
    *,
    root: Path | None = None,
    observer: Observer | None = None,
    on_unit: Callable[[str, int, int, float], None] | None = None,
) -> Study:
    """Train and measure whatever is not there yet; killed at any moment, the same call goes on.

    Args:
        plan: What to do. A folder belongs to one plan, but for its seeds, methods, sweep and 2x2, which may grow.
        folder: Where everything goes.
        root: Folder with the data set's files.
        observer: Is told how each training goes.
        on_unit: Told the name of each model before it is trained and measured, its number, of how many, and how many
            seconds are left, judging by those before (0: unknown).

    Raises:
        UsageError: The folder holds another study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(plan, folder)
    torch.set_num_threads(plan.threads)
    test = datasets.load(plan.data, root, "test")
    units = [(entry, seed) for seed in range(plan.seeds) for entry in plan.entries()]
    # Seed by seed, so that a study that was stopped has something of everything.
    seconds: list[float] = []
    judge_config = recipe(plan.data, "standard", seed=_JUDGE_SEED, **_given(plan))
    tell = on_unit or (lambda name, number, count, left: None)
    tell("the independent network", 0, len(units), 0.0)
    train(judge_config, folder / "judge", root=root, resume=True, observer=observer)
    judge = load_model(folder / "judge")[0].to(plan.device)
    for number, (entry, seed) in enumerate(units):
        if _values_path(folder, entry.name, seed).exists():
            continue
        to_do = sum(not _values_path(folder, e.name, s).exists() for e, s in units)
        left = sum(seconds) / len(seconds) * to_do if seconds else 0.0
        tell(f"{entry.name}, seed {seed}", number + 1, len(units), left)
        started = time.perf_counter()
        config = configuration(plan, entry, seed, folder)
        out = folder / "models" / _folder(entry.name, seed)
        train(config, out, root=root, resume=True, observer=observer)
        network = load_model(out)[0].to(plan.device)
        values = measure(network, test, judge, Protocol(config.eps, samples=plan.samples))
        _write_values(_values_path(folder, entry.name, seed), values)
        seconds.append(time.perf_counter() - started)
    summary = {entry.name: _summary(folder, entry.name, plan.seeds) for entry in plan.entries()}
    terms = {entry.name: _rows(folder / "models" / _folder(entry.name, 0)) for entry in plan.entries()}
    study = Study(plan, test, summary, terms, folder)
    content = {
        "plan": asdict(plan),
        "measures": {name: text for name, (text, _) in MEASURES.items()},
        "summary": summary,
    }
    write_atomically(folder / "study.json", json.dumps(content, indent=1) + "\n")
    return study


def configuration(plan: Plan, entry: Entry, seed: int, folder: Path) -> TrainingConfig:
    """How a model of the study is trained."""
    options = dict(entry.options)
    if "teacher" in METHODS[entry.method].options:
        options["teacher"] = str((folder / "models" / _folder("standard", seed)).resolve())
    config = recipe(plan.data, entry.method, seed=seed, options=options, shuffle_labels=entry.shuffled, **_given(plan))
    if entry.factor != 1.0:
        options = {**config.options, "weight": config.options["weight"] * entry.factor}
        config = recipe(
            plan.data, entry.method, seed=seed, options=options, shuffle_labels=entry.shuffled, **_given(plan)
        )
    return config


def _entry(method: str) -> Entry:
    norms = {"gradient-penalty-l2": 2.0, "gradient-penalty-linf": float("inf")}
    if method in norms:
        return Entry(method, "gradient-penalty", (("norm", norms[method]),))
    return Entry(method, method)


def _given(plan: Plan) -> dict[str, Any]:
    given: dict[str, Any] = {"threads": plan.threads, "device": plan.device, "eval_every": 10**6}
    return given if plan.epochs is None else {**given, "epochs": plan.epochs}


def _claim(plan: Plan, folder: Path) -> None:
    """A folder holds models of one data set and one length of training."""
    mine = {"data": plan.data, "epochs": plan.epochs, "samples": plan.samples, "threads": plan.threads}
    path = folder / "plan.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [f"{name} {theirs.get(name)} -> {value}" for name, value in mine.items() if theirs.get(name) != value]
        if changed:
            raise UsageError(f"{folder} holds another study ({', '.join(changed)}): choose another folder")
    write_atomically(path, json.dumps(mine, indent=1) + "\n")


def _folder(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _values_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "measures" / f"{_folder(name, seed)}.safetensors"


def _write_values(path: Path, values: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: value.contiguous() for name, value in values.items()}))


def _summary(folder: Path, name: str, seeds: int) -> dict[str, dict[str, Any]]:
    from safetensors.torch import load_file

    files = [load_file(_values_path(folder, name, seed)) for seed in range(seeds)]
    summary = summarise({each: torch.stack([file[each] for file in files], 1) for each in MEASURES})
    for name_of_measure, values in summary.items():
        values["seeds"] = [_mean(file[name_of_measure]) for file in files]
    return summary


def _mean(values: Tensor) -> float | None:
    finite = values[values.isfinite()]
    return float(finite.double().mean()) if len(finite) else None


def _rows(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
