"""`robustkern evaluate`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeElapsedColumn
from rich.table import Table

from robustkern import data as datasets
from robustkern._settings import THREADS
from robustkern._text import terminal
from robustkern.attacks._common import box_diameter
from robustkern.evaluation import ATTACKS, Accuracy, MissingPackage, Report, Settings, evaluate
from robustkern.evaluation.report import FILES, export_state_dict, write_partial, write_report
from robustkern.evaluation.suite import autoattack_package
from robustkern.training import Interrupted, TrainingError, UsageError, load_model
from robustkern.training.errors import require
from robustkern.training.figures import eps_text
from robustkern.training.files import RunLock, make_writable, refuse_foreign, remove_stale
from robustkern.training.weights import load_model_for

from .errors import FAILED, one_line_errors, print_error
from .options import ROOT_HELP, device_name, names, option, path, takes
from .progress import bar, say

_ATTACKS_HELP = f"Attacks, separated by commas, of: {', '.join(ATTACKS)}."
_OUT_HELP = "Where the files go. Default: RUN/evaluation, or evaluation-NAME beside a file of weights."
_EXPORT_HELP = 'Also write the weights as {"state_dict": ...}, as RobustBench reads them.'


@takes(
    Settings,
    eps={"help": "Radius: 8/255 or 0.1. Default: the one it was trained with."},
    attacks={"kind": str, "default": ",".join(ATTACKS), "help": _ATTACKS_HELP, "read": names},
)
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run directory, or a file of weights.", metavar="RUN", parser=path)],
    device: Annotated[str, option("cpu or cuda.", read=device_name)] = "cpu",
    threads: Annotated[int | None, option("CPU threads.", read=THREADS)] = None,
    data: Annotated[str | None, option("Another data set than the one it was trained on.")] = None,
    root: Annotated[Path | None, option(ROOT_HELP, read=path)] = None,
    out: Annotated[Path | None, option(_OUT_HELP, read=path)] = None,
    export: Annotated[Path | None, option(_EXPORT_HELP, read=path)] = None,
    strict: Annotated[bool, option("Exit with status 1 if a check fails.", "--strict", read=None)] = False,
    **settings: Any,
) -> None:
    """Attack a trained classifier, and check whether the result can be believed."""
    settings["attacks"] = tuple(name.strip() for name in settings["attacks"].split(","))
    with one_line_errors():
        report = evaluate_run(
            run, Console(emoji=False), data=data, root=root, out=out, export=export, device=device, threads=threads,
            **settings,
        )  # fmt: skip
    if strict and not report.sound:
        failed = ", ".join(check.name for check in report.checks if not check.passed)
        print_error(f"--strict: {report.unchecked or f'not to be trusted: {failed}'}")
        raise typer.Exit(FAILED)


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

    The arguments are the command's; `settings` are fields of `Settings`, where eps defaults to the one that the run was
    trained with.

    Raises:
        UsageError: The data set has other images or classes, a setting makes no sense, or the folder is in use, or is
            neither empty nor an evaluation.
        TrainingError: The run cannot be read, or a package is missing.
        Interrupted: SIGINT or SIGTERM; the attacks that were finished are in the files.
    """
    require(device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch sees no CUDA device")
    if threads is not None:
        torch.set_num_threads(threads)
    name = data or load_model(run)[1].get("data")
    require(bool(name), f"{run} does not say what it was trained on: give --data")
    test = datasets.load(str(name), root, "test")
    model, description = load_model_for(run, test)
    if settings.get("eps") is None:
        settings["eps"] = description.get("eps", 8 / 255)
    try:
        chosen = Settings(**settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    widest = box_diameter(chosen.norm, test.in_shape)
    limit = f"{widest:g}, the {chosen.norm} diameter of the images' box"
    require(chosen.eps <= widest, f"eps must be at most {limit}, got {chosen.eps}")
    if "autoattack" in chosen.attacks:
        try:
            autoattack_package()
        except MissingPackage as error:
            raise TrainingError(str(error)) from error
    folder = out or (run / "evaluation" if run.is_dir() else run.parent / f"evaluation-{run.stem}")
    source = {"run": str(run), "data": str(name), "model": description["model"], "weights": description["sha256"]}
    model = model.to(device)
    # Trouble with files shows now, not after hours of attacks.
    with _claimed(folder), _termination_as_interrupt():
        if export is not None:
            export_state_dict(model, export)
        finished: list[str] = []

        def keep(report: Report) -> None:
            write_partial(report, folder, source)
            finished[:] = [accuracy.name for accuracy in report.attacks]

        try:
            with _bar(console) as on_stage:
                report = evaluate(model, test, chosen, device=device, on_stage=on_stage, on_attack=keep)
            write_report(report, model, folder, source)
        except KeyboardInterrupt:
            kept = f"{folder}/ has what was finished ({', '.join(finished)})" if finished else "no attack was finished"
            raise Interrupted("stopped by a signal", f"{kept}; the same command begins anew") from None
    print_report(report, console, str(run))
    say(console, f"\n{terminal(folder)}/ holds evaluation.json, evaluation.png and adversaries.safetensors")
    if export is not None:
        say(console, f"{terminal(export)}: the weights, for loaders that take a state_dict")
    return report


def print_report(report: Report, console: Console, name: str) -> None:
    """The table: accuracies with their intervals, then what the checks found."""
    settings = report.settings
    ball = {"linf": "Linf", "l2": "L2"}[settings.norm]
    title = f"{terminal(name)}: {ball}, eps {eps_text(settings.eps)}, the first {len(report.y)} test images"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("", "accuracy", "95 % interval", "right", "time"):
        table.add_column(column, justify="left" if not column else "right")
    for accuracy in (report.clean, *report.attacks):
        table.add_row(*_cells(accuracy), f"{accuracy.seconds:.1f} s")
    if report.worst is not None:
        table.add_row(*_cells(report.worst), "", style="bold")
    console.print(table)
    if report.worst is not None:
        weakest = min(report.with_images, key=lambda row: row["worst"]["accuracy"])
        share, samples = weakest["worst"]["accuracy"], weakest["worst"]["samples"]
        say(console, f"weakest class: {terminal(weakest['class'])}, {100 * share:.1f} % of {samples}")
    steepness = Table(title="\nslopes and margins (not accuracies)", title_justify="left", box=None, pad_edge=False)
    for column in ("", "median", "quartiles"):
        steepness.add_column(column, justify="left" if not column else "right")
    for measure, values in report.steepness.items():
        q1, median, q3 = ("-" if values[q] is None else f"{values[q]:.3g}" for q in ("q1", "median", "q3"))
        steepness.add_row(measure, median, f"{q1} to {q3}")
    console.print(steepness)
    checks = Table(title="\nchecks", title_justify="left", box=None, pad_edge=False, show_header=False)
    for check in report.checks:
        yes, no = ("✓", "✗") if console.encoding.startswith("utf") else ("ok", "NO")
        mark = f"[green]{yes}[/green]" if check.passed else f"[bold red]{no}[/bold red]"
        checks.add_row(mark, terminal(check.name), terminal(check.finding))
    if report.checks:
        console.print(checks)
    if report.unchecked:
        say(console, f"\nnothing to check: {report.unchecked}")
    flags = [check.name for check in report.checks if not check.passed]
    if flags:
        say(console, f"[bold red]do not trust these accuracies[/bold red]: {', '.join(flags)}")


def _cells(accuracy: Accuracy) -> tuple[str, str, str, str]:
    low, high = accuracy.interval
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    return accuracy.name, f"{100 * accuracy.value:.1f} %", interval, f"{accuracy.right}/{accuracy.samples}"


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The right to write an evaluation into a folder that is empty or holds one; writes a trial file first."""

    def check() -> None:
        refuse_foreign(folder, FILES, "an evaluation", marker=FILES[0])
        for file in (folder / name for name in FILES):
            require(not file.is_dir(), f"{file} is a folder, not a file of an evaluation")

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


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar; it is called with the name of what is measured, how much of it is done, and the total."""
    tasks: dict[str, TaskID] = {}

    def on_stage(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            while tasks:
                progress.remove_task(tasks.popitem()[1])
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)

    with bar(console, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        yield on_stage
