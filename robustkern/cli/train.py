"""`robustkern train`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from robustkern import data as datasets
from robustkern._choices import LAWS
from robustkern._settings import Range, counts, setting
from robustkern._text import terminal
from robustkern.training import (
    METHODS,
    Observers,
    Result,
    TrainingConfig,
    UsageError,
    read_config,
    read_settings,
    recipe,
    train,
)
from robustkern.training.config import AUGMENTATION, MEASURING, OPTIMIZATION, RUN, WHAT
from robustkern.training.recipes import absolute
from robustkern.training.tensorboard import TensorBoard

from .errors import one_line_errors
from .options import (
    DATA_HELP,
    MODEL_HELP,
    MODEL_SET_HELP,
    ROOT_HELP,
    assigned,
    assignment,
    device_name,
    milestone_epochs,
    numbers,
    option,
    path,
    takes,
)
from .progress import TrainingProgress, say

_METHOD = "Options of the method"
_CONFIG_HELP = "YAML file with any of these settings, such as a run's config.yaml; options override it."
_TENSORBOARD_HELP = "Write scalars for TensorBoard into the run directory."
_WORKERS_HELP = "Processes that read images, with an image size; they change no bit. Default: 2."
_SHARD_HELP = "Divide weights, gradients and optimizer among the processes, by FSDP2."
_TIMEOUT_HELP = "Seconds after which the others give up on a process that does not answer. Default: 600."


@dataclass
class MethodOptions:
    """Options that several methods have.

    Attributes:
        weight: Weight of the smoothness term.
        norm: Norm of the input gradient: 1 for Linf attacks, 2, inf, or any p >= 1.
        projections: Random projections of the Jacobian for each sample; 0: its exact norm.
        law: Law of the projections.
        every: Penalise one step in N, with N times the weight.
        fraction: Penalise the Jacobian on this share of each batch.
        label_smoothing: Label smoothing, 0 to 1.
    """

    weight: float = setting(valid=Range(0), panel=_METHOD)
    norm: float = setting(valid=Range(1, open=""), panel=_METHOD, flags="--norm -p")
    projections: int = setting(valid=counts(0, 10**6), panel=_METHOD)
    law: str = setting(panel=_METHOD)
    every: int = setting(valid=counts(), panel=_METHOD)
    fraction: float = setting(valid=Range(0, 1, open="("), panel=_METHOD)
    label_smoothing: float = setting(valid=Range(0, 1), panel=_METHOD)


_NAMED = [field.name for field in dataclasses.fields(MethodOptions)]
_OTHERS = sorted({name for method in METHODS.values() for name in method.options} - set(_NAMED))
_SET_HELP = f"Another option of the method, as NAME=VALUE: {', '.join(_OTHERS)}. Can be repeated."


@takes(
    MethodOptions,
    TrainingConfig,
    defaults=False,
    panels=(WHAT, AUGMENTATION, _METHOD, OPTIMIZATION, MEASURING, RUN),
    data={"help": f"{DATA_HELP} Default: digits."},
    method={"help": f"{', '.join(METHODS)}. Default: gradient-penalty."},
    options=None,
    model={"help": MODEL_HELP},
    model_options={"kind": list[str], "flags": ("--model-set",), "help": MODEL_SET_HELP, "read": assignment},
    data_mean={"kind": str, "read": numbers},
    data_std={"kind": str, "read": numbers},
    eps={"help": "Radius in units of the images: 8/255 or 0.1. Default: per data set."},
    law={"help": f"Law of the projections: {', '.join(LAWS)}."},
    betas={"kind": str, "read": numbers},
    milestones={"kind": str, "read": milestone_epochs},
    device={"read": device_name},
)
def train_command(
    config: Annotated[Path | None, option(_CONFIG_HELP, panel=WHAT, read=path)] = None,
    set_: Annotated[list[str] | None, option(_SET_HELP, "--set", panel=_METHOD, read=assignment)] = None,
    tensorboard: Annotated[bool, option(_TENSORBOARD_HELP, "--tensorboard", panel=MEASURING, read=None)] = False,
    out: Annotated[Path | None, option("Run directory. Default: runs/DATA-METHOD.", panel=RUN, read=path)] = None,
    root: Annotated[Path | None, option(ROOT_HELP, panel=RUN, read=path)] = None,
    resume: Annotated[bool, option("Go on with the run in --out.", "--resume", panel=RUN, read=None)] = False,
    shard: Annotated[bool, option(_SHARD_HELP, "--shard", panel=RUN, read=None)] = False,
    timeout: Annotated[float, option(_TIMEOUT_HELP, panel=RUN, read=Range(0, 1e9, open="("), show=False)] = 600.0,
    workers: Annotated[int, option(_WORKERS_HELP, panel=RUN, read=counts(0, 1024), show=False)] = 2,
    **given: Any,
) -> None:
    """Train a classifier; interrupted at any moment, go on with --resume.

    Several processes, on one machine or more: torchrun --nproc-per-node 4 -m robustkern train ...
    """
    console = Console(quiet=os.environ.get("RANK", "0") != "0", emoji=False)
    settings = {name: value for name, value in given.items() if value is not None}
    options = {name: settings.pop(name) for name in _NAMED if name in settings}
    for name, _, value in (text.partition("=") for text in set_ or ()):  # the method knows the types
        options[name.strip().replace("-", "_")] = value.strip()
    with one_line_errors():
        if "model_options" in settings:
            settings["model_options"] = assigned(settings["model_options"])
        chosen, out = _chosen(config, out, resume, options, settings)
        with TrainingProgress(console) as progress:
            observer = Observers(progress, TensorBoard(out)) if tensorboard else progress
            result = train(
                chosen, out, root=root, resume=resume, observer=observer, timeout=timeout, workers=workers, shard=shard
            )
        _print_result(console, result, chosen)


def _chosen(
    file: Path | None, out: Path | None, resume: bool, options: dict[str, Any], settings: dict[str, Any]
) -> tuple[TrainingConfig, Path]:
    """The configuration and the run directory, from the options, a file of settings and a run to go on with."""
    if file is not None:
        try:
            read = read_settings(file)
        except UsageError as error:
            raise UsageError(f"--config {error}") from error
        options = {**read.pop("options", {}), **options}
        if "model_options" in settings:
            settings["model_options"] = {**read.get("model_options", {}), **settings["model_options"]}
        settings = {**read, **settings}
    data, method = settings.pop("data", None), settings.pop("method", None)
    if out is None:
        out = Path("runs") / f"{Path(data or 'digits').name}-{method or 'gradient-penalty'}"
    if resume and (out / "config.yaml").exists():
        return _resumed(read_config(out), data, method, options, settings), out
    return recipe(data or "digits", method or "gradient-penalty", options=options, **settings), out


def _resumed(
    stored: TrainingConfig, data: str | None, method: str | None, options: dict[str, Any], settings: dict[str, Any]
) -> TrainingConfig:
    """The stored configuration, updated by the command line; `train` refuses if that changes anything."""
    if data is not None and data not in datasets.NAMES:
        data = str(Path(data).resolve())
    settings.update(absolute(settings))
    method = method or stored.method
    options = {**stored.options, **options}
    if method in METHODS:
        options = METHODS[method].complete(method, options)
    return dataclasses.replace(stored, **settings, data=data or stored.data, method=method, options=options)


def _print_result(console: Console, result: Result, config: TrainingConfig) -> None:
    for name, row in result.accuracies.items():
        say(
            console,
            f"{name:>4} weights (epoch {row['epoch']}): test accuracy {100 * row['clean_accuracy']:.1f} %, "
            f"under PGD-{config.pgd_steps} {100 * row['robust_accuracy']:.1f} %",
        )
    out = terminal(result.out)
    say(console, f"[green]done[/green]: {out}/ holds model.safetensors, metrics.jsonl and the figures")
