"""The command line: `robustkern train`, `robustkern evaluate`, `robustkern demo`, `robustkern info`.

Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped by SIGINT or SIGTERM with everything saved, so that a batch
system can start the same command again with `--resume`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from robustkern import data as datasets
from robustkern import models
from robustkern.ops.random_cotangents import LAWS
from robustkern.training import (
    METHODS,
    Interrupted,
    TrainingConfig,
    TrainingError,
    UsageError,
    read_config,
    recipe,
    train,
)

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
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is neither a number nor a fraction such as 8/255") from None


_DATA_HELP = f"{', '.join(datasets.NAMES)}, or a folder with train/CLASS/*.png and test/CLASS/*.png."
_ROOT_HELP = "Folder with the data set's files."


@app.command("train")
def train_command(
    data: Annotated[str | None, typer.Option(help=_DATA_HELP + " Default: digits.")] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}. Default: gradient-penalty.")] = None,
    eps: Annotated[
        str | None, typer.Option(help="Radius in units of the images: 8/255 or 0.1. Default: per data set.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the smoothness term.")] = None,
    norm: Annotated[
        float | None,
        typer.Option("--norm", "-p", help="Norm of the input gradient: 1 for Linf attacks, 2, inf, or any p >= 1."),
    ] = None,
    projections: Annotated[
        int | None, typer.Option(help="Random projections of the Jacobian for each sample; 0: its exact norm.")
    ] = None,
    law: Annotated[str | None, typer.Option(help=f"Of the projections: {', '.join(LAWS)}.")] = None,
    every: Annotated[int | None, typer.Option(help="Penalise the Jacobian in one step of so many.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Penalise the Jacobian of that share of a batch.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Label smoothing, 0 to 1.")] = None,
    model: Annotated[str | None, typer.Option(help=f"{', '.join(models.MODELS)}.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    schedule: Annotated[str | None, typer.Option(help="one-cycle, cosine or constant.")] = None,
    ramp: Annotated[
        float | None, typer.Option(help="Share of the training over which the weight grows from 0 to full.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; 0: no clipping.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    impl: Annotated[str | None, typer.Option(help="auto, kernel or reference: which ops to use.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    train_samples: Annotated[int | None, typer.Option(help="Train on the first N samples; 0: all.")] = None,
    eval_samples: Annotated[int | None, typer.Option(help="Attack the first N test samples; 0: all.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Epochs between attacks; the last is always measured.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints inside an epoch; 0: only at its end.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/DATA-METHOD.")] = None,
    root: Annotated[Path | None, typer.Option(help=_ROOT_HELP)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a classifier; interrupted at any moment, go on with --resume."""
    given: dict[str, Any] = {
        "model": model, "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr,
        "weight_decay": weight_decay, "schedule": schedule, "ramp": ramp, "clip": clip, "seed": seed, "impl": impl,
        "device": device, "threads": threads, "train_samples": train_samples, "eval_samples": eval_samples,
        "eval_every": eval_every, "checkpoint_every": checkpoint_every, "eps": None if eps is None else parse_eps(eps),
    }  # fmt: skip
    options: dict[str, Any] = {
        "weight": weight, "norm": norm, "projections": projections, "law": law, "every": every, "fraction": fraction,
        "label_smoothing": label_smoothing,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: value for name, value in options.items() if value is not None}
    console = Console()
    with _one_line_errors():
        if out is None:
            out = Path("runs") / f"{Path(data or 'digits').name}-{method or 'gradient-penalty'}"
        if resume and (out / "config.json").exists():
            config = _resumed(read_config(out), data, method, options, given)
        else:
            config = recipe(data or "digits", method or "gradient-penalty", options=options, **given)
        with TrainingProgress(console) as progress:
            result = train(config, out, root=root, resume=resume, observer=progress)
        console.print(f"[green]done[/green]: {result.out}/ holds model.safetensors, metrics.jsonl and the figures")


def _resumed(
    stored: TrainingConfig, data: str | None, method: str | None, options: dict[str, Any], given: dict[str, Any]
) -> TrainingConfig:
    """The stored configuration with what was given on the command line; `train` refuses if that changes anything."""
    if data is not None and data not in datasets.NAMES:
        data = str(Path(data).resolve())
    return dataclasses.replace(
        stored,
        **given,
        data=data or stored.data,
        method=method or stored.method,
        options={**stored.options, **options},
    )


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

    console = Console()
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
    out: Annotated[Path | None, typer.Option(help="Where the files go. Default: RUN/evaluation.")] = None,
    export: Annotated[
        Path | None, typer.Option(help='Also write the weights as {"state_dict": ...}, as RobustBench reads them.')
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if a check fails.")] = False,
) -> None:
    """Attack a trained classifier, and check whether the result can be believed."""
    from robustkern.evaluation.command import evaluate_run

    console = Console()
    with _one_line_errors():
        report = evaluate_run(
            run, console, data=data, root=root, out=out, export=export, device=device, threads=threads,
            eps=None if eps is None else parse_eps(eps), norm=norm, samples=samples, pgd_steps=pgd_steps,
            restarts=restarts, apgd_steps=apgd_steps, check_samples=check_samples, batch_size=batch_size, seed=seed,
            attacks=tuple(name.strip() for name in attacks.split(",") if name.strip()),
        )  # fmt: skip
    if strict and not report.sound:
        raise typer.Exit(FAILED)


@app.command()
def info() -> None:
    """Print versions, machine and extensions: what a report of a problem needs."""
    from robustkern._info import run

    raise typer.Exit(run([]))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors that a user can do something about become one line on stderr and an exit status."""
    try:
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
    print(f"robustkern: {message}", file=sys.stderr)
    raise typer.Exit(status)
