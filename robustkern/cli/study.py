"""`robustkern study`."""

import os
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from robustkern import data as datasets
from robustkern._settings import counts
from robustkern._text import terminal
from robustkern.study.given import parse_given
from robustkern.study.measures import MEASURES
from robustkern.study.plan import SWEEP, Plan
from robustkern.study.report import draw, write_report, write_tables
from robustkern.study.study import Study, run
from robustkern.training import UsageError
from robustkern.training.files import make_writable, write_atomically

from .errors import one_line_errors
from .options import ROOT_HELP, device_name, names, option, path, takes
from .progress import say

_SHOWN = ("clean_accuracy", "robust_accuracy", "gradient_norm", "centred_alignment", "inversion_accuracy")


_METHODS_HELP = "Methods of the paper and of ours, separated by commas, or none. Default: all."
_SWEEP_HELP = "Multiples of the gradient penalty's weight, separated by commas, or none."
_CHECKPOINT_HELP = "NAME=RUN, NAME=module:function or NAME=MODEL@FILE: a network to measure as it is. Can be repeated."
_JOBS_HELP = "Models trained at a time, each in a process of its own. Default: as many as cores."
_REPORT_HELP = "Where the report, its figures and study.json go. Default: beside the models."


@takes(
    Plan,
    data={"help": f"{', '.join(datasets.NAMES)}."},
    methods={"kind": str, "default": None, "help": _METHODS_HELP, "read": names},
    given=None,
    sweep={"kind": str, "default": None, "help": _SWEEP_HELP, "read": names},
    epochs={"kind": int, "help": "Epochs of each training. Default: half of what train does."},
    device={"read": device_name},
)
def study_command(
    out: Annotated[Path | None, option("Where everything goes. Default: runs/study-DATA.", read=path)] = None,
    checkpoint: Annotated[list[str] | None, option(_CHECKPOINT_HELP)] = None,
    jobs: Annotated[int | None, option(_JOBS_HELP, read=counts(1, 1024))] = None,
    report: Annotated[Path | None, option(_REPORT_HELP, read=path)] = None,
    root: Annotated[Path | None, option(ROOT_HELP, read=path)] = None,
    **plan: Any,
) -> None:
    """Train every method and measure what its input gradients show; stopped at any moment, the same command goes on."""
    folder = out or Path("runs") / f"study-{Path(plan['data']).name}"
    with one_line_errors():
        run_study(
            folder, Console(emoji=False), root=root, jobs=jobs, report=report, checkpoints=tuple(checkpoint or ()),
            **plan,
        )  # fmt: skip


def run_study(
    out: Path,
    console: Console,
    *,
    methods: str | None = None,
    sweep: str | None = None,
    checkpoints: tuple[str, ...] = (),
    root: Path | None = None,
    jobs: int | None = None,
    report: Path | None = None,
    **plan: Any,
) -> Study:
    """Train, measure, draw, and print the table.

    The arguments are the command's: `methods` and `sweep` are separated by commas, "none" or None; without `jobs`, at
    most 8 models run at a time, on a GPU one. `plan` holds the other fields of `Plan`.

    Raises:
        UsageError: A setting makes no sense, or the folder holds another study.
    """
    if methods is not None:
        names = "" if methods.strip() == "none" else methods
        plan["methods"] = tuple(name.strip() for name in names.split(",") if name.strip())
    chosen = Plan(**plan, sweep=_sweep(sweep), given=tuple(parse_given(text) for text in checkpoints))

    def on_unit(name: str, number: int, count: int, left: float) -> None:
        remaining = f", about {left / 60:.0f} min left" if left else ""
        say(console, f"[dim]{number}/{count}[/dim] {terminal(name)}{remaining}")

    if report is not None:
        make_writable(report)  # fails now rather than after all the training
    study = run(chosen, out, root=root, jobs=_cores(chosen) if jobs is None else jobs, on_unit=on_unit)
    console.print("[dim]drawing[/dim]")
    page = write_report(study, draw(study, report), report)
    write_tables(study, report)
    if report is not None:
        write_atomically(report / "study.json", (out / "study.json").read_text())
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for measure in _SHOWN:
        table.add_column(MEASURES[measure][0], justify="right", max_width=18)
    for name, measures in study.summary.items():
        means = [measures[measure]["value"] for measure in _SHOWN]
        table.add_row(terminal(name), *("-" if mean is None else f"{mean:.3f}" for mean in means))
    console.print(table)
    say(console, f"{terminal(page)} holds every figure and number; figures/ and study.json beside it")
    return study


def _cores(plan: Plan) -> int:
    if plan.device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // plan.threads))


def _sweep(text: str | None) -> tuple[float, ...]:
    if text is None:
        return SWEEP
    try:
        return () if text.strip() == "none" else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--sweep: numbers with commas, or none, got {text!r}") from error
