"""What a classifier learns to see: every method trained, measured and drawn, from one command.

The claim under test (Helland and VanHoudnos 2020) is that orientation of the decision boundary and smoothness together
make input gradients recognisable to people, and that either alone does not. A study trains

    the matrix     every method, with the recipe of the data set
    the sweep      the gradient penalty with ever larger weights, from 0: recognisability against smoothness
    the 2x2        the gradient penalty with its weight and with weight 0, on true and on shuffled labels: orientation
                   with and without smoothness, smoothness with and without orientation

each with several seeds, measures every model by the same protocol, and writes figures and a report. Networks that were
trained elsewhere can be measured beside them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern import data as datasets
from robustkern._files import parse_json, read_bytes
from robustkern._text import brief
from robustkern.data import Dataset
from robustkern.evaluation.checks import correct
from robustkern.evaluation.suite import RADII
from robustkern.training import (
    CheckpointError,
    Interrupted,
    Observer,
    TrainingConfig,
    TrainingError,
    UsageError,
    read_config,
    recipe,
    teacher_recipe,
    train,
)
from robustkern.training.errors import require
from robustkern.training.files import refuse_foreign, write_atomically
from robustkern.training.weights import load_model_for, read_tensors, write_tensors

from . import results
from .given import load_given
from .measures import MEASURES, NOISE_INVERSIONS, Judges, Protocol, accuracy_curve, measure
from .parallel import in_parallel
from .plan import TWO_BY_TWO, Entry, Plan, configuration, folder_name, teacher_folder, training_settings

_JUDGES = {"robust": "fgsm", "standard": "standard"}  # how each is trained, see `robustkern.study.Judges`
_JUDGE_SEED = 1000  # no model of the study has it
_CURVE = "accuracy at the radii"
_TERMS = ("epoch", "orientation", "smoothness")  # of a row of metrics, for the figures
_PARTS = ("models", "judges", "measures", "study.json", "report.html", "tables.md", "figures")
_NAMES = (*MEASURES, _CURVE)
_MOST_PLAN, _MOST_METRICS = 1 << 16, 64 << 20  # bytes


@dataclass
class Study:
    """A finished study.

    Attributes:
        plan: What it consists of.
        data: Test images.
        summary: For each entry's name, for each measure: value, low, high over images and seeds, and their number.
        curves: For each entry's name, points of eps, accuracy, low, high under PGD-20.
        terms: For each entry that was trained, rows of metrics of its first model.
        noise: For each entry, the images that its first model made from noise, see
            `robustkern.study.measures.NOISE_INVERSIONS`.
        contrasts: Differences between the cells of the 2x2, see `robustkern.study.results.contrasts`.
        correlations: For each of `robustkern.study.results.SMOOTHNESS`, each measure's with it, over the matrix; see
            `robustkern.study.results.rank_correlations`.
        judges: The share of the test images that each judge names right.
        folder: Where all files are.
    """

    plan: Plan
    data: Dataset
    folder: Path
    summary: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    terms: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    contrasts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    correlations: dict[str, dict[str, float]] = field(default_factory=dict)
    judges: dict[str, float] = field(default_factory=dict)

    def network(self, name: str, seed: int = 0) -> nn.Module:
        """The model of an entry, on the study's device."""
        source = dict(self.plan.given).get(name)
        if source is not None:
            return load_given(source, self.data).to(self.plan.device)
        return load_model_for(self.folder / "models" / folder_name(name, seed), self.data)[0].to(self.plan.device)


@dataclass(frozen=True)
class Unit:
    """One model of a study: an entry with a seed, or one that judges the others (entry None, a name of `_JUDGES`)."""

    entry: Entry | None
    seed: int = 0
    judge: str = ""

    @property
    def name(self) -> str:
        if self.entry is None:
            return f"the {self.judge} judge"
        return self.entry.name if self.entry.source else f"{self.entry.name}, seed {self.seed}"


def run(
    plan: Plan,
    folder: Path,
    *,
    root: Path | None = None,
    jobs: int = 1,
    observer: Observer | None = None,
    on_unit: Callable[[str, int, int, float], None] | None = None,
) -> Study:
    """Train and measure whatever is not there yet; if it is killed at any moment, the same call goes on.

    Args:
        plan: What to do. A folder belongs to one plan, of which only seeds, methods, sweep and 2x2 may grow.
        folder: Where everything goes.
        root: Folder with the data set's files.
        jobs: Models at a time, each in a process with `plan.threads` threads. The results do not depend on it.
        observer: Told how each training goes; with one job only.
        on_unit: Told the name of each model before it is trained and measured, its number, of how many, and how many
            seconds are left, judging by those before (0: unknown).

    Raises:
        UsageError: The folder holds another study, or a given network does not fit the data.
        Interrupted: SIGINT or SIGTERM; what was trained was saved.
    """
    require(jobs >= 1, f"jobs must be at least 1, got {jobs}")
    torch.set_num_threads(plan.threads)  # for the figures too
    entries = plan.entries()
    test = datasets.load(plan.data, root, "test")
    for entry in entries:
        if entry.source:  # before anything is trained
            load_given(entry.source, test)
    refuse_foreign(folder, _PARTS, "a study", marker="plan.json")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(plan, folder)
    # Seed by seed, so that a stopped study has some models of every kind.
    units = [Unit(entry, seed) for seed in range(plan.seeds) for entry in entries if not (entry.source and seed)]
    tasks = [
        *(Unit(None, judge=judge) for judge in _JUDGES),
        *(unit for unit in units if not _is_there(unit, plan, folder, test)),
    ]
    there = len(units) - len(tasks) + len(_JUDGES)
    started: dict[int, float] = {}
    seconds: list[float] = []

    def on_start(number: int) -> None:
        started[number] = time.perf_counter()
        left = sum(seconds) / len(seconds) * (len(tasks) - number) / jobs if seconds else 0.0
        if on_unit is not None:
            on_unit(tasks[number].name, max(0, there + number + 1 - len(_JUDGES)), len(units), left)

    def on_done(number: int) -> None:
        if tasks[number].entry is not None:  # judges are trained, but not measured
            seconds.append(time.perf_counter() - started[number])

    def ready(unit: Unit, done: set[int]) -> bool:
        return unit.entry is None or done >= set(range(len(_JUDGES)))  # nothing is measured without the judges

    work = partial(make, plan=plan, folder=folder, root=root, observer=observer if jobs == 1 else None)
    try:
        in_parallel(tasks, work, jobs, ready=ready, on_start=on_start, on_done=on_done)
    except Interrupted as error:
        raise Interrupted(error.done, "the same command goes on from there") from None
    study = _read(plan, folder, test)
    content = {
        "plan": asdict(plan),
        "measures": {name: text for name, (text, _) in MEASURES.items()},
        "summary": study.summary,
        "curves": study.curves,
        "contrasts": study.contrasts,
        "rank correlation with smoothness": study.correlations,
        "judges": study.judges,
    }
    write_atomically(folder / "study.json", json.dumps(content, indent=1) + "\n")
    return study


def _is_there(unit: Unit, plan: Plan, folder: Path, test: Dataset) -> bool:
    """Whether a model was measured, and was trained with the settings that it would get now."""
    assert unit.entry is not None
    if unit.entry.source:  # its name may mean another network by now
        return False
    out = folder / "models" / folder_name(unit.entry.name, unit.seed)
    if not (out / "results.json").exists() or read_values(_values_path(folder, unit.entry, unit.seed)) is None:
        return False
    return not read_config(out).differences(configuration(plan, unit.entry, unit.seed, folder, test.in_shape))


def read_values(path: Path) -> dict[str, Tensor] | None:
    """The measures of a model; None if they are not there, damaged, or not all: an earlier version wrote fewer."""
    try:
        values = read_tensors(path)[0]
    except CheckpointError:
        return None
    whole = all(name in values and values[name].numel() and values[name].is_floating_point() for name in _NAMES)
    return values if whole and values[_CURVE].dim() == 2 and values[_CURVE].shape[1] == len(RADII) else None


def make(unit: Unit, *, plan: Plan, folder: Path, root: Path | None, observer: Observer | None) -> None:
    """Train one model, unless it is there or given, and measure it."""
    torch.set_num_threads(plan.threads)  # this may be the first call in a process of its own
    if unit.entry is None:
        config = recipe(plan.data, _JUDGES[unit.judge], seed=_JUDGE_SEED, **training_settings(plan))
        _train(config, _judge(folder, unit.judge), root, observer)
        return
    test = datasets.load(plan.data, root, "test")
    if unit.entry.source:
        network = load_given(unit.entry.source, test)
    else:
        out = folder / "models" / folder_name(unit.entry.name, unit.seed)
        if unit.entry.method == "distillation":
            config = teacher_recipe(plan.data, seed=unit.seed, **training_settings(plan))
            _train(config, teacher_folder(folder, unit.seed), root, observer)
        _train(configuration(plan, unit.entry, unit.seed, folder, test.in_shape), out, root, observer)
        network = load_model_for(out, test)[0]
    judges = Judges(**{judge: load_model_for(_judge(folder, judge), test)[0].to(plan.device) for judge in _JUDGES})
    network.to(plan.device)
    values = measure(network, test, judges, Protocol(plan.eps, samples=plan.samples))
    few = test.first(plan.samples)
    x, y = few.images.to(plan.device), few.labels.to(plan.device)
    values[_CURVE] = accuracy_curve(network, x, y, [multiple * plan.eps for multiple in RADII]).float().cpu()
    path = _values_path(folder, unit.entry, unit.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, values)


def _train(config: TrainingConfig, out: Path, root: Path | None, observer: Observer | None) -> None:
    """Train, resume, or leave a finished run of the same configuration as it is."""
    if not (out / "results.json").exists() or read_config(out).differences(config):
        train(config, out, root=root, resume=True, observer=observer, draw=False)  # the report has their figures


def _claim(plan: Plan, folder: Path) -> None:
    """Reserve a folder for this plan: it holds models of one data set and one length of training."""
    mine = {"data": plan.data, "epochs": plan.epochs, "samples": plan.samples, "threads": plan.threads}
    path = folder / "plan.json"
    if path.exists():
        theirs = read_plan(path)
        changed = [
            f"{name} {brief(theirs.get(name))} -> {value}" for name, value in mine.items() if theirs.get(name) != value
        ]
        require(not changed, f"{folder} holds another study ({', '.join(changed)}): choose another folder")
    write_atomically(path, json.dumps(mine, indent=1) + "\n")


def read_plan(path: Path) -> dict[str, Any]:
    """The content of a study's `plan.json`; UsageError if it is not a plan."""
    try:
        plan = parse_json(read_bytes(path, _MOST_PLAN))
    except (OSError, ValueError) as error:
        reason = brief(getattr(error, "strerror", None) or error)
        raise UsageError(f"{path}: not the plan of a study ({reason})") from error
    require(isinstance(plan, dict), f"{path}: not the plan of a study")
    return plan


def _judge(folder: Path, judge: str) -> Path:
    return folder / "judges" / judge


def _values_path(folder: Path, entry: Entry, seed: int) -> Path:
    return folder / "measures" / f"{folder_name(entry.name, seed)}.safetensors"


def _read(plan: Plan, folder: Path, test: Dataset) -> Study:
    """A study from the files of its models."""
    study = Study(plan, test, folder)
    radii = [multiple * plan.eps for multiple in RADII]
    models: dict[str, list[dict[str, Tensor]]] = {}
    shapes: dict[str, torch.Size] = {}
    for entry in plan.entries():
        seeds = range(1 if entry.source else plan.seeds)
        models[entry.name] = []
        for path in (_values_path(folder, entry, seed) for seed in seeds):
            values = read_values(path) or {}
            shapes = shapes or {name: values[name].shape for name in values if name in _NAMES}
            if not values or any(values[name].shape != shape for name, shape in shapes.items()):
                raise TrainingError(f"{path}: damaged, or measured otherwise: remove it, and the same command makes it")
            models[entry.name].append(values)
        study.summary[entry.name] = results.summary(models[entry.name])
        study.curves[entry.name] = results.curve([values[_CURVE] for values in models[entry.name]], radii)
        if NOISE_INVERSIONS in models[entry.name][0]:
            study.noise[entry.name] = models[entry.name][0][NOISE_INVERSIONS]
        if not entry.source:
            study.terms[entry.name] = _rows(folder / "models" / folder_name(entry.name, 0))
    if plan.two_by_two:
        study.contrasts = results.contrasts({cell: models[name] for cell, name in TWO_BY_TWO.items()})
    matrix = [study.summary[name] for name in plan.matrix]
    for smoothness in results.SMOOTHNESS:
        if found := results.rank_correlations(matrix, smoothness):
            study.correlations[smoothness] = found
    for judge in _JUDGES:
        network = load_model_for(_judge(folder, judge), test)[0]
        study.judges[judge] = float(correct(network, test.images, test.labels, 500).float().mean())
    return study


def _rows(run_folder: Path) -> list[dict[str, Any]]:
    path = run_folder / "metrics.jsonl"
    try:
        return parse_rows(read_bytes(path, _MOST_METRICS))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {brief(getattr(error, 'strerror', None) or error)}") from error


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    """Rows of a run's metrics, with the numbers that figures need; ValueError if it holds something else."""
    rows = [parse_json(line) for line in content.splitlines()]
    for row in rows:
        if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in _TERMS):
            raise ValueError("not the metrics of a run: a row without epoch, orientation or smoothness")
    if not rows:
        raise ValueError("no rows of metrics")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300
