"""`robustkern evaluate`: what stands between the command line and the evaluation."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from robustkern import data as datasets
from robustkern.training import TrainingError, UsageError, load_model

from .report import export_state_dict, print_report, write_report
from .results import Report, Settings
from .suite import MissingPackage, evaluate


def evaluate_run(
    run: Path,
    console: Console,
    *,
    data: str | None = None,
    root: Path | None = None,
    out: Path | None = None,
    export: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    **settings: Any,
) -> Report:
    """Evaluate a run on its data set's test images, print the tables and write the files.

    Args:
        run: A run directory, or a file of weights.
        console: Where to print.
        data: Another data set than the one it was trained on.
        root: Folder with the data set's files.
        out: Where the files go; by default `evaluation/` in the run directory, or `evaluation-<stem>/` beside a file of
            weights.
        export: Also write the weights there, as RobustBench's loaders read them.
        device: "cpu" or "cuda".
        threads: CPU threads.
        **settings: Of `Settings`; eps by default the one the run was trained with.

    Raises:
        UsageError: The data set has other images or classes, or a setting makes no sense.
        TrainingError: The run cannot be read, or a package is missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device")
    if threads is not None:
        torch.set_num_threads(threads)
    model, description = load_model(run)
    name = data or description.get("data")
    if not name:
        raise UsageError(f"{run} does not say what it was trained on: give --data")
    test = datasets.load(str(name), root, "test")
    if list(test.in_shape) != list(description["in_shape"]) or len(test.classes) != len(description["classes"]):
        raise UsageError(
            f"{run} takes images {list(description['in_shape'])} of {len(description['classes'])} classes, {name} has "
            f"{list(test.in_shape)} of {len(test.classes)}"
        )
    if settings.get("eps") is None:
        settings["eps"] = description.get("eps", 8 / 255)
    try:
        chosen = Settings(**settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    folder = out or (run / "evaluation" if run.is_dir() else run.parent / f"evaluation-{run.stem}")
    model = model.to(device)
    try:
        with _Bar(console) as bar:
            report = evaluate(model, test, chosen, device=device, on_stage=bar.on_stage)
    except MissingPackage as error:
        raise TrainingError(str(error)) from error
    source = {"run": str(run), "data": str(name), "model": description["model"], "weights": description["sha256"]}
    write_report(report, model, folder, source)
    print_report(report, console, str(run))
    console.print(f"\n{folder}/ holds evaluation.json, evaluation.png and adversaries.safetensors", highlight=False)
    if export is not None:
        export_state_dict(model, export)
        console.print(f"{export}: the weights, for loaders that take a state_dict", highlight=False)
    return report


class _Bar:
    """What is being measured, and how far it is."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._stage, self._task = "", TaskID(0)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_stage(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            if self._stage:
                self._progress.remove_task(self._task)
            self._stage, self._task = stage, self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done, total=total)
