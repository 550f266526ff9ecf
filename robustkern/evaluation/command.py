"""`robustkern evaluate`: what stands between the command line and the evaluation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from robustkern import data as datasets
from robustkern._text import terminal
from robustkern.attacks._common import box_diameter
from robustkern.training import Interrupted, TrainingError, UsageError, load_model
from robustkern.training.files import RunLock, make_writable, refuse_foreign, remove_stale
from robustkern.training.weights import load_model_for

from .report import FILES, export_state_dict, print_report, write_partial, write_report
from .results import Report, Settings
from .suite import MissingPackage, autoattack_package, evaluate


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
        UsageError: The data set has other images or classes, a setting makes no sense, or the folder is neither empty
            nor an evaluation, or in use.
        TrainingError: The run cannot be read, or a package is missing.
        Interrupted: SIGINT or SIGTERM; the attacks that were finished are in the files.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device")
    if threads is not None:
        torch.set_num_threads(threads)
    name = data or load_model(run)[1].get("data")
    if not name:
        raise UsageError(f"{run} does not say what it was trained on: give --data")
    test = datasets.load(str(name), root, "test")
    model, description = load_model_for(run, test)
    if settings.get("eps") is None:
        settings["eps"] = description.get("eps", 8 / 255)
    try:
        chosen = Settings(**settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    widest = box_diameter(chosen.norm, test.in_shape)
    if chosen.eps > widest:
        raise UsageError(
            f"eps must be at most {widest:g}, the {chosen.norm} diameter of the images' box, got {chosen.eps}"
        )
    if "autoattack" in chosen.attacks:
        try:
            autoattack_package()
        except MissingPackage as error:
            raise TrainingError(str(error)) from error
    folder = out or (run / "evaluation" if run.is_dir() else run.parent / f"evaluation-{run.stem}")
    source = {"run": str(run), "data": str(name), "model": description["model"], "weights": description["sha256"]}
    model = model.to(device)
    # Whatever can go wrong with files does so now, and not after hours of attacks.
    with _claimed(folder), _termination_as_interrupt():
        if export is not None:
            export_state_dict(model, export)
        finished: list[str] = []

        def keep(report: Report) -> None:
            write_partial(report, folder, source)
            finished[:] = [accuracy.name for accuracy in report.attacks]

        try:
            with _Bar(console) as bar:
                report = evaluate(model, test, chosen, device=device, on_stage=bar.on_stage, on_attack=keep)
            write_report(report, model, folder, source)
        except KeyboardInterrupt:
            kept = f"{folder}/ has what was finished ({', '.join(finished)})" if finished else "no attack was finished"
            raise Interrupted("stopped by a signal", f"{kept}; the same command begins anew") from None
    print_report(report, console, str(run))
    files = f"\n{terminal(folder)}/ holds evaluation.json, evaluation.png and adversaries.safetensors"
    console.print(files, highlight=False, soft_wrap=True)
    if export is not None:
        console.print(f"{terminal(export)}: the weights, for loaders that take a state_dict", highlight=False)
    return report


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The right to write an evaluation into a folder, which is empty or holds one, and the certainty that it can be."""

    def check() -> None:
        refuse_foreign(folder, FILES, "an evaluation", marker=FILES[0])
        for name in FILES:
            if (folder / name).is_dir():
                raise UsageError(f"{folder / name} is a folder, not a file of an evaluation")

    check()
    make_writable(folder)
    with RunLock(folder):
        check()
        remove_stale(folder)
        yield


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM does what SIGINT does: it raises KeyboardInterrupt, in the midst of an attack too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
