"""The command line: `robustkern train`, `robustkern evaluate`, `robustkern demo`, `robustkern info`.

Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped by SIGINT or SIGTERM with everything saved, so that a batch
system can start the same command again with `--resume`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from robustkern import data as datasets
from robustkern import models
from robustkern._text import loosen_streams, plain, terminal
from robustkern.ops.random_cotangents import LAWS
from robustkern.training import (
    METHODS,
    Interrupted,
    Observers,
    TrainingConfig,
    TrainingError,
    UsageError,
    read_config,
    read_settings,
    recipe,
    train,
)
from robustkern.training.config import SCHEDULES, parse_fraction
from robustkern.training.tensorboard import TensorBoard

from ._progress import TrainingProgress

FAILED, WRONG_USE, STOPPED = 1, 2, 75

app = typer.Typer(
    name="robustkern",
    help="Robust training with fused second derivatives.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse_eps(text: str) -> float:
    """A radius written as a number (0.1) or as a fraction (8/255)."""
    try:
        return parse_fraction(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def parse_milestones(text: str) -> tuple[int, ...]:
    """Epochs separated by commas: 100,150."""
    try:
        return tuple(int(epoch) for epoch in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of epochs such as 100,150") from None


_DATA_HELP = f"{', '.join(datasets.NAMES)}, or a folder with train/CLASS/*.png and test/CLASS/*.png."
_ROOT_HELP = "Folder with the data set's files."
_NAMED_OPTIONS = {"weight", "norm", "projections", "law", "every", "fraction", "label_smoothing"}
_OTHER_OPTIONS = sorted({name for method in METHODS.values() for name in method.options} - _NAMED_OPTIONS)
_WHAT, _METHOD, _OPTIMIZATION = "What is trained", "Options of the method", "Optimization"
_MEASURING, _RUN = "Validation and measuring", "The run"


def _option(help: str, *names: str, panel: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


@app.command("train")
def train_command(
    data: Annotated[str | None, _option(_DATA_HELP + " Default: digits.", panel=_WHAT)] = None,
    method: Annotated[str | None, _option(f"{', '.join(METHODS)}. Default: gradient-penalty.", panel=_WHAT)] = None,
    model: Annotated[str | None, _option(f"{', '.join(models.MODELS)}.", panel=_WHAT)] = None,
    eps: Annotated[
        str | None, _option("Radius in units of the images: 8/255 or 0.1. Default: per data set.", panel=_WHAT)
    ] = None,
    config: Annotated[
        Path | None,
        _option("YAML file with any of these settings, such as a run's config.yaml; options override it.", panel=_WHAT),
    ] = None,
    weight: Annotated[float | None, _option("Weight of the smoothness term.", panel=_METHOD)] = None,
    norm: Annotated[
        float | None,
        _option(
            "Norm of the input gradient: 1 for Linf attacks, 2, inf, or any p >= 1.", "--norm", "-p", panel=_METHOD
        ),
    ] = None,
    projections: Annotated[
        int | None, _option("Random projections of the Jacobian for each sample; 0: its exact norm.", panel=_METHOD)
    ] = None,
    law: Annotated[str | None, _option(f"Of the projections: {', '.join(LAWS)}.", panel=_METHOD)] = None,
    every: Annotated[
        int | None, _option("Penalise one step of so many, at as many times the weight.", panel=_METHOD)
    ] = None,
    fraction: Annotated[float | None, _option("Penalise the Jacobian of that share of a batch.", panel=_METHOD)] = None,
    label_smoothing: Annotated[float | None, _option("Label smoothing, 0 to 1.", panel=_METHOD)] = None,
    set_: Annotated[
        list[str] | None,
        _option(
            f"Another option of the method, as NAME=VALUE: {', '.join(_OTHER_OPTIONS)}. May be repeated.",
            "--set",
            panel=_METHOD,
        ),
    ] = None,
    epochs: Annotated[int | None, _option("Passes over the training set.", panel=_OPTIMIZATION)] = None,
    batch_size: Annotated[
        int | None, _option("Samples per step, those of all processes together.", panel=_OPTIMIZATION)
    ] = None,
    optimizer: Annotated[str | None, _option("sgd (Nesterov momentum 0.9) or adamw.", panel=_OPTIMIZATION)] = None,
    lr: Annotated[float | None, _option("Peak learning rate.", panel=_OPTIMIZATION)] = None,
    weight_decay: Annotated[float | None, _option("Weight decay.", panel=_OPTIMIZATION)] = None,
    schedule: Annotated[str | None, _option(f"{', '.join(SCHEDULES)}.", panel=_OPTIMIZATION)] = None,
    milestones: Annotated[
        str | None,
        _option("For schedule step: epochs after which the rate falls, 100,150.", panel=_OPTIMIZATION),
    ] = None,
    gamma: Annotated[float | None, _option("What it is multiplied with there.", panel=_OPTIMIZATION)] = None,
    ramp: Annotated[
        float | None,
        _option("Share of the training over which the weight grows from 0 to full.", panel=_OPTIMIZATION),
    ] = None,
    clip: Annotated[float | None, _option("Largest gradient norm; 0: no clipping.", panel=_OPTIMIZATION)] = None,
    ema: Annotated[
        float | None, _option("Decay of a moving average of the weights, such as 0.995; 0: none.", panel=_OPTIMIZATION)
    ] = None,
    amp: Annotated[bool | None, _option("Forward passes in bfloat16.", "--amp/--no-amp", panel=_OPTIMIZATION)] = None,
    sync_batch_norm: Annotated[
        bool | None,
        _option(
            "With several GPUs: BatchNorm over the whole batch.",
            "--sync-batch-norm/--no-sync-batch-norm",
            panel=_OPTIMIZATION,
        ),
    ] = None,
    validation: Annotated[
        float | None,
        _option("Hold out that share, or number, of the training samples; keep the best weights.", panel=_MEASURING),
    ] = None,
    eval_samples: Annotated[
        int | None, _option("Attack the first N test or validation samples; 0: all.", panel=_MEASURING)
    ] = None,
    eval_every: Annotated[
        int | None, _option("Epochs between attacks; the last is always measured.", panel=_MEASURING)
    ] = None,
    pgd_steps: Annotated[int | None, _option("Steps of the attack.", panel=_MEASURING)] = None,
    watch: Annotated[
        str | None,
        _option("What to do about catastrophic overfitting: warn, stop or off.", panel=_MEASURING),
    ] = None,
    tensorboard: Annotated[
        bool, _option("Write scalars for TensorBoard into the run directory.", "--tensorboard", panel=_MEASURING)
    ] = False,
    seed: Annotated[int | None, _option("Seed of everything random.", panel=_RUN)] = None,
    impl: Annotated[str | None, _option("auto, kernel or reference: which ops to use.", panel=_RUN)] = None,
    device: Annotated[str | None, _option("cpu or cuda.", panel=_RUN)] = None,
    threads: Annotated[int | None, _option("CPU threads of each process.", panel=_RUN)] = None,
    train_samples: Annotated[int | None, _option("Train on the first N samples; 0: all.", panel=_RUN)] = None,
    shuffle_labels: Annotated[
        bool | None, _option("A control: training images get each other's labels.", "--shuffle-labels", panel=_RUN)
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("Steps between checkpoints inside an epoch; 0: only at its end.", panel=_RUN)
    ] = None,
    max_skipped: Annotated[
        int | None, _option("Steps in a row that may be skipped for a loss that is not finite.", panel=_RUN)
    ] = None,
    out: Annotated[Path | None, _option("Run directory. Default: runs/DATA-METHOD.", panel=_RUN)] = None,
    root: Annotated[Path | None, _option(_ROOT_HELP, panel=_RUN)] = None,
    resume: Annotated[bool, _option("Go on with the run in --out.", "--resume", panel=_RUN)] = False,
    timeout: Annotated[
        float, _option("Seconds after which a process that does not answer is given up. Default: 600.", panel=_RUN)
    ] = 600.0,
) -> None:
    """Train a classifier; interrupted at any moment, go on with --resume.

    Several processes, on one machine or more: torchrun --nproc-per-node 4 -m robustkern train ...
    """
    given: dict[str, Any] = {
        "model": model, "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr,
        "weight_decay": weight_decay, "schedule": schedule, "gamma": gamma, "ramp": ramp, "clip": clip, "ema": ema,
        "amp": amp, "sync_batch_norm": sync_batch_norm, "seed": seed, "impl": impl, "device": device,
        "threads": threads, "train_samples": train_samples,
        "shuffle_labels": shuffle_labels, "validation": validation, "eval_samples": eval_samples,
        "eval_every": eval_every, "pgd_steps": pgd_steps, "watch": watch, "checkpoint_every": checkpoint_every,
        "max_skipped": max_skipped, "eps": None if eps is None else parse_eps(eps),
        "milestones": None if milestones is None else parse_milestones(milestones),
    }  # fmt: skip
    options: dict[str, Any] = {
        "weight": weight, "norm": norm, "projections": projections, "law": law, "every": every, "fraction": fraction,
        "label_smoothing": label_smoothing, **_assignments(set_ or []),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: value for name, value in options.items() if value is not None}
    console = Console(quiet=os.environ.get("RANK", "0") != "0", emoji=False)
    with _one_line_errors():
        if config is not None:
            settings = read_settings(config)
            data, method = data or settings.pop("data", None), method or settings.pop("method", None)
            options = {**settings.pop("options", {}), **options}
            given = {**{name: value for name, value in settings.items() if name not in ("data", "method")}, **given}
        if out is None:
            out = Path("runs") / f"{Path(data or 'digits').name}-{method or 'gradient-penalty'}"
        if resume and (out / "config.yaml").exists():
            settings_of_run = _resumed(read_config(out), data, method, options, given)
        else:
            settings_of_run = recipe(data or "digits", method or "gradient-penalty", options=options, **given)
        with TrainingProgress(console) as progress:
            observer = Observers(progress, TensorBoard(out)) if tensorboard else progress
            result = train(settings_of_run, out, root=root, resume=resume, observer=observer, timeout=timeout)
        for name, row in result.accuracies.items():
            robust = f"{100 * row['robust_accuracy']:.1f} %"
            console.print(
                f"{name:>4} weights (epoch {row['epoch']}): test accuracy {100 * row['clean_accuracy']:.1f} %, "
                f"under PGD-{settings_of_run.pgd_steps} {robust}",
                highlight=False,
                soft_wrap=True,
            )
        files = f"{terminal(result.out)}/ holds model.safetensors, metrics.jsonl and the figures"
        console.print(f"[green]done[/green]: {files}", highlight=False, soft_wrap=True)


def _assignments(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE each; the method knows the types."""
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not sign:
            raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE")
        values[name.replace("-", "_")] = value
    return values


def _resumed(
    stored: TrainingConfig, data: str | None, method: str | None, options: dict[str, Any], given: dict[str, Any]
) -> TrainingConfig:
    """The stored configuration with what was given on the command line; `train` refuses if that changes anything."""
    if data is not None and data not in datasets.NAMES:
        data = str(Path(data).resolve())
    method = method or stored.method
    options = {**stored.options, **options}
    if method in METHODS:
        options = METHODS[method].complete(method, options)
    return dataclasses.replace(stored, **given, data=data or stored.data, method=method, options=options)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where both runs and the figures go.")] = Path("runs/demo"),
    data: Annotated[str, typer.Option(help=_DATA_HELP)] = "digits-28",
    root: Annotated[Path | None, typer.Option(help=_ROOT_HELP)] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each training. Default: per data set.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Train one network with cross-entropy alone and with the gradient penalty, and look at both."""
    from robustkern.study.demo import run_demo

    console = Console(emoji=False)
    given = {"epochs": epochs, "seed": seed, "threads": threads}
    with _one_line_errors():
        run_demo(out, data, console, root=root, **{name: value for name, value in given.items() if value is not None})


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run directory, or a file of weights.", metavar="RUN")],
    eps: Annotated[str | None, typer.Option(help="Radius: 8/255 or 0.1. Default: the one it was trained with.")] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    attacks: Annotated[str, typer.Option(help="Of pgd, apgd, autoattack; with commas.")] = "pgd,apgd,autoattack",
    samples: Annotated[int, typer.Option(help="The first N test images; 0: all.")] = 1000,
    pgd_steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 50,
    restarts: Annotated[int, typer.Option(help="Random starts of PGD.")] = 10,
    apgd_steps: Annotated[int, typer.Option(help="Steps of APGD.")] = 100,
    check_samples: Annotated[int, typer.Option(help="Images that the checks attack.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    data: Annotated[str | None, typer.Option(help="Another data set than it was trained on.")] = None,
    root: Annotated[Path | None, typer.Option(help=_ROOT_HELP)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the files go. Default: RUN/evaluation, or evaluation-NAME beside a file of weights."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help='Also write the weights as {"state_dict": ...}, as RobustBench reads them.')
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if a check fails.")] = False,
) -> None:
    """Attack a trained classifier, and check whether the result can be believed."""
    from robustkern.evaluation.command import evaluate_run

    console = Console(emoji=False)
    with _one_line_errors():
        report = evaluate_run(
            run, console, data=data, root=root, out=out, export=export, device=device, threads=threads,
            eps=None if eps is None else parse_eps(eps), norm=norm, samples=samples, pgd_steps=pgd_steps,
            restarts=restarts, apgd_steps=apgd_steps, check_samples=check_samples, batch_size=batch_size, seed=seed,
            attacks=tuple(name.strip() for name in attacks.split(",") if name.strip()),
        )  # fmt: skip
    if strict and not report.sound:
        raise typer.Exit(FAILED)


@app.command("study")
def study_command(
    data: Annotated[str, typer.Option(help=f"{', '.join(datasets.NAMES)}.")] = "digits-28",
    out: Annotated[Path | None, typer.Option(help="Where everything goes. Default: runs/study-DATA.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Of the paper's and ours, with commas, or none. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Models of each kind.")] = 3,
    sweep: Annotated[
        str | None, typer.Option(help="Multiples of the gradient penalty's weight, with commas, or none.")
    ] = None,
    two_by_two: Annotated[bool, typer.Option(help="Train on shuffled labels as well.")] = True,
    samples: Annotated[int, typer.Option(help="Test images that are measured.")] = 200,
    epochs: Annotated[int | None, typer.Option(help="Of each training. Default: half of what train does.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="NAME=RUN or NAME=module:function: a network to measure as it is. Can be repeated."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Models trained at a time, each in a process. Default: as many as cores.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Where the report, its figures and study.json go. Default: beside the models.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    root: Annotated[Path | None, typer.Option(help=_ROOT_HELP)] = None,
) -> None:
    """Train every method and measure what its input gradients show; stopped at any moment, the same command goes on."""
    from robustkern.study.command import run_study

    console = Console(emoji=False)
    with _one_line_errors():
        run_study(
            out or Path("runs") / f"study-{Path(data).name}", console, data=data, methods=methods, seeds=seeds,
            sweep=sweep, two_by_two=two_by_two, samples=samples, epochs=epochs, threads=threads, device=device,
            root=root, jobs=jobs, report=report, checkpoints=tuple(checkpoint or ()),
        )  # fmt: skip


@app.command()
def info() -> None:
    """Print versions, machine and extensions: what a report of a problem needs."""
    from robustkern._info import run

    raise typer.Exit(run([]))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that a user can do something about become one line on stderr and an exit status; warnings a line."""
    rank = os.environ.get("RANK", "0")
    told: set[str] = set()  # a study loads its data for every model

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, datasets.DataWarning):
            shown(message, category, *where, **more)
        elif rank == "0" and str(message) not in told:
            told.add(str(message))
            print(f"robustkern: {plain(message)}", file=sys.stderr)

    loosen_streams()
    try:
        with warnings.catch_warnings():
            shown, warnings.showwarning = warnings.showwarning, show
            yield
    except UsageError as error:
        status, message = WRONG_USE, str(error)
    except (datasets.DataError, TrainingError) as error:
        status, message = FAILED, str(error)
    except Interrupted as error:
        status, message = STOPPED, str(error)
    except OSError as error:
        status, message = FAILED, f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    else:
        return
    if rank == "0" or status == FAILED:  # of what is the same for all processes, the first one tells
        print(f"robustkern: {plain(message)}", file=sys.stderr)
    raise typer.Exit(status)
