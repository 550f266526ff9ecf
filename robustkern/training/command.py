"""`robustkern train`: what stands between the command line and the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from robustkern import data as datasets
from robustkern._progress import TrainingProgress
from robustkern._text import terminal

from .claim import read_config
from .config import TrainingConfig, read_settings
from .errors import UsageError
from .methods import METHODS
from .observer import Observers
from .recipes import recipe
from .tensorboard import TensorBoard
from .trainer import Result, train


def train_run(
    console: Console,
    out: Path | None,
    *,
    data: str | None,
    method: str | None,
    config: Path | None,
    options: dict[str, Any],
    settings: dict[str, Any],
    root: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    timeout: float = 600.0,
) -> Result:
    """Train, or go on training, and print how it goes.

    Args:
        console: Where to print.
        out: The run directory; None: `runs/DATA-METHOD`.
        data: A data set; None: the one of `config`, or the digits.
        method: A method; None: that of `config`, or the gradient penalty.
        config: A file of settings, which those that are given override.
        options: Of the method; None where one was not given.
        settings: Other fields of `TrainingConfig`; None where one was not given.
        root: Folder with the data set's files.
        resume: Go on with the run in `out`.
        tensorboard: Write scalars for TensorBoard.
        timeout: Seconds after which a process that does not answer is given up.

    Raises:
        UsageError, DataError, TrainingError, Interrupted: See `train`.
    """
    settings, options = ({n: v for n, v in given.items() if v is not None} for given in (settings, options))
    if config is not None:
        try:
            read = read_settings(config)
        except UsageError as error:
            raise UsageError(f"--config {error}") from error
        data, method = data or read.pop("data", None), method or read.pop("method", None)
        options = {**read.pop("options", {}), **options}
        settings = {**{name: value for name, value in read.items() if name not in ("data", "method")}, **settings}
    if out is None:
        out = Path("runs") / f"{Path(data or 'digits').name}-{method or 'gradient-penalty'}"
    if resume and (out / "config.yaml").exists():
        chosen = _resumed(read_config(out), data, method, options, settings)
    else:
        chosen = recipe(data or "digits", method or "gradient-penalty", options=options, **settings)
    with TrainingProgress(console) as progress:
        observer = Observers(progress, TensorBoard(out)) if tensorboard else progress
        result = train(chosen, out, root=root, resume=resume, observer=observer, timeout=timeout)
    for name, row in result.accuracies.items():
        console.print(
            f"{name:>4} weights (epoch {row['epoch']}): test accuracy {100 * row['clean_accuracy']:.1f} %, "
            f"under PGD-{chosen.pgd_steps} {100 * row['robust_accuracy']:.1f} %",
            highlight=False,
            soft_wrap=True,
        )
    files = f"{terminal(result.out)}/ holds model.safetensors, metrics.jsonl and the figures"
    console.print(f"[green]done[/green]: {files}", highlight=False, soft_wrap=True)
    return result


def _resumed(
    stored: TrainingConfig, data: str | None, method: str | None, options: dict[str, Any], settings: dict[str, Any]
) -> TrainingConfig:
    """The stored configuration with what was given on the command line; `train` refuses if that changes anything."""
    if data is not None and data not in datasets.NAMES:
        data = str(Path(data).resolve())
    method = method or stored.method
    options = {**stored.options, **options}
    if method in METHODS:
        options = METHODS[method].complete(method, options)
    return dataclasses.replace(stored, **settings, data=data or stored.data, method=method, options=options)
