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
from torch import nn

from robustkern import data as datasets
from robustkern._settings import THREADS, Range, counts
from robustkern._text import terminal
from robustkern.attacks._common import box_diameter
from robustkern.data import Images, View
from robustkern.evaluation import ATTACKS, Accuracy, MissingPackage, Report, Settings, evaluate
from robustkern.evaluation.report import FILES, export_state_dict, write_partial, write_report
from robustkern.evaluation.suite import autoattack_package
from robustkern.training import Interrupted, TrainingError, UsageError, load_model
from robustkern.training.errors import require
from robustkern.training.figures import eps_text
from robustkern.training.files import RunLock, make_writable, refuse_foreign, remove_stale
from robustkern.training.initial import ModelSpec, initial_model
from robustkern.training.weights import digest, load_model_for

from .errors import FAILED, one_line_errors, print_error
from .options import (
    MODEL_HELP,
    MODEL_SET_HELP,
    ROOT_HELP,
    assigned,
    assignment,
    device_name,
    names,
    numbers,
    option,
    path,
    takes,
)
from .progress import bar, say

_ATTACKS_HELP = f"Attacks, separated by commas, of: {', '.join(ATTACKS)}."
_ELSEWHERE = "A model that was trained elsewhere"
_RUN_HELP = "Run directory, or a file of weights of one. Without: --model, --init and --data say what to evaluate."
_INIT_HELP = "Its weights: a file of safetensors or of torch.save, or pretrained."
_SMOOTH_HELP = "What its ReLU modules were replaced by: gelu, silu or none."
_MEAN_HELP = "Mean of each channel that it normalises by, 0.485,0.456,0.406. Default: what its weights or timm say."
_SIZE_HELP = "Height and width that a folder's images are scaled to. Default: what the run had, or as they are."
_CROP_HELP = "Share of their shorter side that is kept, the middle."
_OUT_HELP = "Where the files go. Default: RUN/evaluation, or evaluation-NAME beside a file of weights."
_EXPORT_HELP = 'Also write the weights as {"state_dict": ...}, as RobustBench reads them.'


@takes(
    Settings,
    panels=(None, _ELSEWHERE),
    eps={"help": "Radius: 8/255 or 0.1. Default: the one it was trained with."},
    attacks={"kind": str, "default": ",".join(ATTACKS), "help": _ATTACKS_HELP, "read": names},
)
def evaluate_command(
    run: Annotated[Path | None, typer.Argument(help=_RUN_HELP, metavar="[RUN]", parser=path)] = None,
    model: Annotated[str | None, option(MODEL_HELP, panel=_ELSEWHERE)] = None,
    init: Annotated[str | None, option(_INIT_HELP, panel=_ELSEWHERE)] = None,
    model_options: Annotated[
        list[str] | None, option(MODEL_SET_HELP, "--model-set", panel=_ELSEWHERE, read=assignment)
    ] = None,
    smooth_activations: Annotated[str, option(_SMOOTH_HELP, panel=_ELSEWHERE)] = "none",
    data_mean: Annotated[Any, option(_MEAN_HELP, panel=_ELSEWHERE, read=numbers)] = None,
    image_size: Annotated[int, option(_SIZE_HELP, panel=_ELSEWHERE, read=counts(0, 1 << 14))] = 0,
    eval_crop: Annotated[float, option(_CROP_HELP, panel=_ELSEWHERE, read=Range(0, 1, open="("))] = 0.875,
    data_std: Annotated[Any, option("Likewise, the deviation.", panel=_ELSEWHERE, read=numbers)] = None,
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
        spec = None
        if model is not None:
            options, mean, std = assigned(model_options), data_mean or (), data_std or ()
            spec = ModelSpec(model, options, init or "", smooth_activations, tuple(mean), tuple(std))
        else:
            given = {"--init": init, "--model-set": model_options, "--data-mean": data_mean, "--data-std": data_std}
            for flag in (flag for flag, value in given.items() if value is not None):
                raise UsageError(f"{flag} belongs to --model")
        report = evaluate_run(
            run, Console(emoji=False), model=spec, image_size=image_size, eval_crop=eval_crop, data=data, root=root,
            out=out, export=export, device=device, threads=threads, **settings,
        )  # fmt: skip
    if strict and not report.sound:
        failed = ", ".join(check.name for check in report.checks if not check.passed)
        print_error(f"--strict: {report.unchecked or f'not to be trusted: {failed}'}")
        raise typer.Exit(FAILED)


def evaluate_run(
    run: Path | None,
    console: Console,
    *,
    model: ModelSpec | None = None,
    image_size: int = 0,
    eval_crop: float = 0.875,
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
    trained with. Without `run`, `model` says what to evaluate; with one, it may name the run's model, which it must
    where that is a function.

    Raises:
        UsageError: The data set has other images or classes, a setting makes no sense, or the folder is in use, or is
            neither empty nor an evaluation.
        TrainingError: The run cannot be read, or a package is missing.
        Interrupted: SIGINT or SIGTERM; the attacks that were finished are in the files.
    """
    require(device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch sees no CUDA device")
    if threads is not None:
        torch.set_num_threads(threads)
    run, network, description, test = _subject(run, model, data, root, (image_size, eval_crop))
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
    of = {"data": description["data"], "model": description["model"], "weights": description["sha256"]}
    source = {"run": str(run), **{name: str(value) for name, value in of.items()}}
    network = network.to(device)
    # Trouble with files shows now, not after hours of attacks.
    with _claimed(folder), _termination_as_interrupt():
        if export is not None:
            export_state_dict(network, export)
        finished: list[str] = []

        def keep(report: Report) -> None:
            write_partial(report, folder, source)
            finished[:] = [accuracy.name for accuracy in report.attacks]

        try:
            with _bar(console) as on_stage:
                report = evaluate(network, test, chosen, device=device, on_stage=on_stage, on_attack=keep)
            write_report(report, network, folder, source)
        except KeyboardInterrupt:
            kept = f"{folder}/ has what was finished ({', '.join(finished)})" if finished else "no attack was finished"
            raise Interrupted("stopped by a signal", f"{kept}; the same command begins anew") from None
    print_report(report, console, str(run))
    say(console, f"\n{terminal(folder)}/ holds evaluation.json, evaluation.png and adversaries.safetensors")
    if export is not None:
        say(console, f"{terminal(export)}: the weights, for loaders that take a state_dict")
    return report


def _subject(
    run: Path | None, spec: ModelSpec | None, data: str | None, root: Path | None, view: tuple[int, float]
) -> tuple[Path, nn.Module, dict[str, Any], Images]:
    """What names the evaluation, the network, its description, and the images."""
    if run is not None:
        require(spec is None or not spec.init, "either RUN or --init: both are weights")
        name = None if spec is None else spec.name
        described = load_model(run, name)[1]
        trained_on = data or described.get("data")
        require(bool(trained_on), f"{run} does not say what it was trained on: give --data")
        size = view[0] or described.get("image_size", 0)
        crop = view[1] if view[0] else described.get("eval_crop", view[1])
        test = _test_images(str(trained_on), root, size, crop, described["in_shape"][0])
        network, description = load_model_for(run, test, name)
        return run, network, {**description, "data": trained_on}, test
    require(spec is not None and bool(spec.init), "nothing to evaluate: give RUN, or --model and --init")
    require(data is not None, "--model with --init takes --data: the weights do not say what they were trained on")
    assert spec is not None and data is not None
    test = _test_images(data, root, *view, 0)
    network, problem = initial_model(spec, test, trained=True)
    require(not problem, problem)
    description = {"model": spec.name, "data": data, "sha256": digest(network.state_dict())}
    return Path(spec.init), network.eval(), description, test


def _test_images(data: str, root: Path | None, size: int, crop: float, channels: int) -> Images:
    if not size:
        return datasets.load(data, root, "test")
    return datasets.stream(data, View(size, center=crop), root, "test", channels=channels)


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
