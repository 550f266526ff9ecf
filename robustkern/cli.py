"""The command line: `robustkern train`, `robustkern evaluate`, `robustkern demo`, `robustkern info`.

Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped by SIGINT or SIGTERM with everything saved, so that a batch
system can start the same command again with `--resume`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from robustkern import data as datasets
from robustkern import models
from robustkern._arguments import SEEDS, THREADS, Range, counts
from robustkern._command_line import (
    FAILED,
    OneLineErrors,
    assignment,
    milestone_epochs,
    names,
    number,
    one_line_errors,
    one_of,
    path,
    print_error,
    text,
)
from robustkern.evaluation.results import RANGES as EVALUATED
from robustkern.ops.random_cotangents import LAWS
from robustkern.study.plan import RANGES as PLANNED
from robustkern.training import METHODS
from robustkern.training.command import train_run
from robustkern.training.config import RANGES as SETTINGS
from robustkern.training.config import SCHEDULES

app = typer.Typer(
    name="robustkern",
    cls=OneLineErrors,
    help="Robust training with fused second derivatives.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DATA_HELP = f"{', '.join(datasets.NAMES)}, or a folder with train/CLASS/*.png and test/CLASS/*.png."
_ROOT_HELP = "Folder with the data set's files."
_NAMED_OPTIONS = {"weight", "norm", "projections", "law", "every", "fraction", "label_smoothing"}
_OTHER_OPTIONS = sorted({name for method in METHODS.values() for name in method.options} - _NAMED_OPTIONS)
_WHAT, _METHOD, _OPTIMIZATION = "What is trained", "Options of the method", "Optimization"
_MEASURING, _RUN = "Validation and measuring", "The run"
_RANGES = {
    **SETTINGS,
    "weight": Range(0),
    "norm": Range(1, open=""),
    "projections": counts(0, 10**6),
    "every": counts(),
    "fraction": Range(0, 1, open="("),
    "label_smoothing": Range(0, 1),
}


def _option(help: str, *names: str, panel: str | None = None, read: Any = text, show: bool = False) -> Any:
    """An option whose values `read` reads: a function, a range or the name of one in `_RANGES`; None for a flag."""
    if isinstance(read, str):
        read = _RANGES[read]
    parser = number(read) if isinstance(read, Range) else read
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=show, parser=parser)


def _shown(help: str, *names: str, read: Any = text) -> Any:
    return _option(help, *names, read=read, show=True)


@app.command("train")
def train_command(
    data: Annotated[str | None, _option(_DATA_HELP + " Default: digits.", panel=_WHAT)] = None,
    method: Annotated[str | None, _option(f"{', '.join(METHODS)}. Default: gradient-penalty.", panel=_WHAT)] = None,
    model: Annotated[str | None, _option(f"{', '.join(models.MODELS)}.", panel=_WHAT)] = None,
    eps: Annotated[
        float | None,
        _option("Radius in units of the images: 8/255 or 0.1. Default: per data set.", panel=_WHAT, read="eps"),
    ] = None,
    config: Annotated[
        Path | None,
        _option(
            "YAML file with any of these settings, such as a run's config.yaml; options override it.",
            panel=_WHAT,
            read=path,
        ),
    ] = None,
    weight: Annotated[float | None, _option("Weight of the smoothness term.", panel=_METHOD, read="weight")] = None,
    norm: Annotated[
        float | None,
        _option(
            "Norm of the input gradient: 1 for Linf attacks, 2, inf, or any p >= 1.",
            "--norm",
            "-p",
            panel=_METHOD,
            read="norm",
        ),
    ] = None,
    projections: Annotated[
        int | None,
        _option(
            "Random projections of the Jacobian for each sample; 0: its exact norm.", panel=_METHOD, read="projections"
        ),
    ] = None,
    law: Annotated[str | None, _option(f"Of the projections: {', '.join(LAWS)}.", panel=_METHOD)] = None,
    every: Annotated[
        int | None, _option("Penalise one step of so many, at as many times the weight.", panel=_METHOD, read="every")
    ] = None,
    fraction: Annotated[
        float | None, _option("Penalise the Jacobian of that share of a batch.", panel=_METHOD, read="fraction")
    ] = None,
    label_smoothing: Annotated[
        float | None, _option("Label smoothing, 0 to 1.", panel=_METHOD, read="label_smoothing")
    ] = None,
    set_: Annotated[
        list[str] | None,
        _option(
            f"Another option of the method, as NAME=VALUE: {', '.join(_OTHER_OPTIONS)}. May be repeated.",
            "--set",
            panel=_METHOD,
            read=assignment,
        ),
    ] = None,
    epochs: Annotated[int | None, _option("Passes over the training set.", panel=_OPTIMIZATION, read="epochs")] = None,
    batch_size: Annotated[
        int | None,
        _option("Samples per step, those of all processes together.", panel=_OPTIMIZATION, read="batch_size"),
    ] = None,
    optimizer: Annotated[str | None, _option("sgd (Nesterov momentum 0.9) or adamw.", panel=_OPTIMIZATION)] = None,
    lr: Annotated[float | None, _option("Peak learning rate.", panel=_OPTIMIZATION, read="lr")] = None,
    weight_decay: Annotated[float | None, _option("Weight decay.", panel=_OPTIMIZATION, read="weight_decay")] = None,
    schedule: Annotated[str | None, _option(f"{', '.join(SCHEDULES)}.", panel=_OPTIMIZATION)] = None,
    milestones: Annotated[
        str | None,
        _option(
            "For schedule step: epochs after which the rate falls, 100,150.", panel=_OPTIMIZATION, read=milestone_epochs
        ),
    ] = None,
    gamma: Annotated[
        float | None, _option("What it is multiplied with there.", panel=_OPTIMIZATION, read="gamma")
    ] = None,
    ramp: Annotated[
        float | None,
        _option("Share of the training over which the weight grows from 0 to full.", panel=_OPTIMIZATION, read="ramp"),
    ] = None,
    clip: Annotated[
        float | None, _option("Largest gradient norm; 0: no clipping.", panel=_OPTIMIZATION, read="clip")
    ] = None,
    ema: Annotated[
        float | None,
        _option("Decay of a moving average of the weights, such as 0.995; 0: none.", panel=_OPTIMIZATION, read="ema"),
    ] = None,
    amp: Annotated[
        bool | None, _option("Forward passes in bfloat16.", "--amp/--no-amp", panel=_OPTIMIZATION, read=None)
    ] = None,
    sync_batch_norm: Annotated[
        bool | None,
        _option(
            "With several GPUs: BatchNorm over the whole batch.",
            "--sync-batch-norm/--no-sync-batch-norm",
            panel=_OPTIMIZATION,
            read=None,
        ),
    ] = None,
    validation: Annotated[
        float | None,
        _option(
            "Hold out that share, or number, of the training samples; keep the best weights.",
            panel=_MEASURING,
            read="validation",
        ),
    ] = None,
    eval_samples: Annotated[
        int | None,
        _option("Attack the first N test or validation samples; 0: all.", panel=_MEASURING, read="eval_samples"),
    ] = None,
    eval_every: Annotated[
        int | None, _option("Epochs between attacks; the last is always measured.", panel=_MEASURING, read="eval_every")
    ] = None,
    pgd_steps: Annotated[int | None, _option("Steps of the attack.", panel=_MEASURING, read="pgd_steps")] = None,
    watch: Annotated[
        str | None, _option("What to do about catastrophic overfitting: warn, stop or off.", panel=_MEASURING)
    ] = None,
    tensorboard: Annotated[
        bool,
        _option("Write scalars for TensorBoard into the run directory.", "--tensorboard", panel=_MEASURING, read=None),
    ] = False,
    seed: Annotated[int | None, _option("Seed of everything random.", panel=_RUN, read="seed")] = None,
    impl: Annotated[str | None, _option("auto, kernel or reference: which ops to use.", panel=_RUN)] = None,
    device: Annotated[str | None, _option("cpu or cuda.", panel=_RUN, read=one_of("cpu", "cuda"))] = None,
    threads: Annotated[int | None, _option("CPU threads of each process.", panel=_RUN, read="threads")] = None,
    train_samples: Annotated[
        int | None, _option("Train on the first N samples; 0: all.", panel=_RUN, read="train_samples")
    ] = None,
    shuffle_labels: Annotated[
        bool | None,
        _option("A control: training images get each other's labels.", "--shuffle-labels", panel=_RUN, read=None),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        _option("Steps between checkpoints inside an epoch; 0: only at its end.", panel=_RUN, read="checkpoint_every"),
    ] = None,
    max_skipped: Annotated[
        int | None,
        _option("Steps in a row that may be skipped for a loss that is not finite.", panel=_RUN, read="max_skipped"),
    ] = None,
    out: Annotated[Path | None, _option("Run directory. Default: runs/DATA-METHOD.", panel=_RUN, read=path)] = None,
    root: Annotated[Path | None, _option(_ROOT_HELP, panel=_RUN, read=path)] = None,
    resume: Annotated[bool, _option("Go on with the run in --out.", "--resume", panel=_RUN, read=None)] = False,
    timeout: Annotated[
        float,
        _option(
            "Seconds after which a process that does not answer is given up. Default: 600.",
            panel=_RUN,
            read=Range(0, 1e9, open="("),
        ),
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
        "max_skipped": max_skipped, "eps": eps, "milestones": milestones,
    }  # fmt: skip
    options: dict[str, Any] = {
        "weight": weight, "norm": norm, "projections": projections, "law": law, "every": every, "fraction": fraction,
        "label_smoothing": label_smoothing, **_assignments(set_ or []),
    }  # fmt: skip
    console = Console(quiet=os.environ.get("RANK", "0") != "0", emoji=False)
    with one_line_errors():
        train_run(
            console, out, data=data, method=method, config=config, root=root,
            resume=resume, tensorboard=tensorboard, timeout=timeout, options=options, settings=given,
        )  # fmt: skip


def _assignments(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE each; the method knows the types."""
    pairs = (given.split("=", 1) for given in texts)
    return {name.strip().replace("-", "_"): value.strip() for name, value in pairs}


@app.command()
def demo(
    out: Annotated[Path, _shown("Where both runs and the figures go.", read=path)] = Path("runs/demo"),
    data: Annotated[str, _shown(_DATA_HELP)] = "digits-28",
    root: Annotated[Path | None, _shown(_ROOT_HELP, read=path)] = None,
    epochs: Annotated[int | None, _shown("Epochs of each training. Default: per data set.", read="epochs")] = None,
    seed: Annotated[int, _shown("Seed of everything random.", read=SEEDS)] = 0,
    threads: Annotated[int | None, _shown("CPU threads.", read=THREADS)] = None,
) -> None:
    """Train one network with cross-entropy alone and with the gradient penalty, and look at both."""
    from robustkern.study.demo import run_demo

    console = Console(emoji=False)
    given = {"epochs": epochs, "seed": seed, "threads": threads}
    with one_line_errors():
        run_demo(out, data, console, root=root, **{name: value for name, value in given.items() if value is not None})


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run directory, or a file of weights.", metavar="RUN", parser=path)],
    eps: Annotated[
        float | None, _shown("Radius: 8/255 or 0.1. Default: the one it was trained with.", read=EVALUATED["eps"])
    ] = None,
    norm: Annotated[str, _shown("linf or l2.")] = "linf",
    attacks: Annotated[str, _shown("Of pgd, apgd, autoattack; with commas.", read=names)] = "pgd,apgd,autoattack",
    samples: Annotated[int, _shown("The first N test images; 0: all.", read=EVALUATED["samples"])] = 1000,
    pgd_steps: Annotated[int, _shown("Steps of PGD.", read=EVALUATED["pgd_steps"])] = 50,
    restarts: Annotated[int, _shown("Random starts of PGD.", read=EVALUATED["restarts"])] = 10,
    apgd_steps: Annotated[int, _shown("Steps of APGD.", read=EVALUATED["apgd_steps"])] = 100,
    check_samples: Annotated[int, _shown("Images that the checks attack.", read=EVALUATED["check_samples"])] = 200,
    batch_size: Annotated[int, _shown("Images at a time.", read=EVALUATED["batch_size"])] = 250,
    seed: Annotated[int, _shown("Seed of everything random.", read=EVALUATED["seed"])] = 0,
    device: Annotated[str, _shown("cpu or cuda.", read=one_of("cpu", "cuda"))] = "cpu",
    threads: Annotated[int | None, _shown("CPU threads.", read=THREADS)] = None,
    data: Annotated[str | None, _shown("Another data set than it was trained on.")] = None,
    root: Annotated[Path | None, _shown(_ROOT_HELP, read=path)] = None,
    out: Annotated[
        Path | None,
        _shown("Where the files go. Default: RUN/evaluation, or evaluation-NAME beside a file of weights.", read=path),
    ] = None,
    export: Annotated[
        Path | None, _shown('Also write the weights as {"state_dict": ...}, as RobustBench reads them.', read=path)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if a check fails.")] = False,
) -> None:
    """Attack a trained classifier, and check whether the result can be believed."""
    from robustkern.evaluation.command import evaluate_run

    console = Console(emoji=False)
    with one_line_errors():
        report = evaluate_run(
            run, console, data=data, root=root, out=out, export=export, device=device, threads=threads,
            eps=eps, norm=norm, samples=samples, pgd_steps=pgd_steps,
            restarts=restarts, apgd_steps=apgd_steps, check_samples=check_samples, batch_size=batch_size, seed=seed,
            attacks=tuple(name.strip() for name in attacks.split(",") if name.strip()),
        )  # fmt: skip
    if strict and not report.sound:
        failed = ", ".join(check.name for check in report.checks if not check.passed)
        print_error(f"--strict: {report.unchecked or f'not to be trusted: {failed}'}")
        raise typer.Exit(FAILED)


@app.command("study")
def study_command(
    data: Annotated[str, _shown(f"{', '.join(datasets.NAMES)}.")] = "digits-28",
    out: Annotated[Path | None, _shown("Where everything goes. Default: runs/study-DATA.", read=path)] = None,
    methods: Annotated[
        str | None, _shown("Of the paper's and ours, with commas, or none. Default: all.", read=names)
    ] = None,
    seeds: Annotated[int, _shown("Models of each kind.", read=PLANNED["seeds"])] = 3,
    sweep: Annotated[
        str | None, _shown("Multiples of the gradient penalty's weight, with commas, or none.", read=names)
    ] = None,
    two_by_two: Annotated[bool, typer.Option(help="Train on shuffled labels as well.")] = True,
    samples: Annotated[int, _shown("Test images that are measured.", read=PLANNED["samples"])] = 200,
    epochs: Annotated[
        int | None, _shown("Of each training. Default: half of what train does.", read=PLANNED["epochs"])
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        _shown("NAME=RUN or NAME=module:function: a network to measure as it is. Can be repeated."),
    ] = None,
    jobs: Annotated[
        int | None,
        _shown("Models trained at a time, each in a process. Default: as many as cores.", read=counts(1, 1024)),
    ] = None,
    report: Annotated[
        Path | None, _shown("Where the report, its figures and study.json go. Default: beside the models.", read=path)
    ] = None,
    threads: Annotated[int, _shown("CPU threads of each.", read=THREADS)] = 1,
    device: Annotated[str, _shown("cpu or cuda.", read=one_of("cpu", "cuda"))] = "cpu",
    root: Annotated[Path | None, _shown(_ROOT_HELP, read=path)] = None,
) -> None:
    """Train every method and measure what its input gradients show; stopped at any moment, the same command goes on."""
    from robustkern.study.command import run_study

    console = Console(emoji=False)
    with one_line_errors():
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
