"""A demonstration of gradient regularisation: the same network, trained with and without the penalty."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from robustkern import _library
from robustkern import data as datasets
from robustkern._settings import SEEDS, THREADS, counts
from robustkern._text import terminal
from robustkern.training import TrainingConfig, build_loss, figures, recipe, train
from robustkern.training.environment import threads as cpu_threads
from robustkern.training.files import refuse_foreign, write_atomically
from robustkern.training.trainer import Result

from . import step_cost
from .errors import one_line_errors
from .options import DATA_HELP, ROOT_HELP, option, path
from .progress import TrainingProgress, say

_EVAL_EVERY = 5  # epochs; the attacks would take longer than the training
_METHODS = ("standard", "gradient-penalty")
_KEPT = ("orientation", "smoothness", "clean_accuracy", "robust_accuracy")  # of the last row of metrics
_ROW_NAMES = {"standard": "cross-entropy\nalone", "gradient-penalty": "with the\npenalty"}


def demo_command(
    out: Annotated[Path, option("Where both runs and the figures go.", read=path)] = Path("runs/demo"),
    data: Annotated[str, option(DATA_HELP)] = "digits-28",
    root: Annotated[Path | None, option(ROOT_HELP, read=path)] = None,
    epochs: Annotated[int | None, option("Epochs of each training. Default: per data set.", read=counts())] = None,
    seed: Annotated[int, option("Seed of everything random.", read=SEEDS)] = 0,
    threads: Annotated[int | None, option("CPU threads.", read=THREADS)] = None,
) -> None:
    """Train one network with cross-entropy alone and with the gradient penalty, and look at both."""
    given = {"epochs": epochs, "seed": seed, "threads": threads}
    with one_line_errors():
        run_demo(out, data, Console(emoji=False), root=root, **{name: v for name, v in given.items() if v is not None})


def run_demo(
    out: Path, data: str, console: Console, *, root: Path | None = None, **given: Any
) -> dict[str, dict[str, Any]]:
    """Train both networks, measure their steps, draw `gradients.png` and `curves.png`, print one row for each.

    Runs that are already there are resumed, so that starting an interrupted demo again finishes it.

    Args:
        out: Where everything goes.
        data: A data set's name.
        console: Where to print.
        root: Where the data set's files are.
        **given: Fields of `TrainingConfig` to set for both runs.

    Returns:
        The rows, as written to `results.json`.
    """
    started = time.perf_counter()
    refuse_foreign(out, (*_METHODS, "gradients.png", "curves.png", "results.json"), "a demo")
    results: dict[str, Result] = {}
    for method in _METHODS:
        with TrainingProgress(console, every=5) as progress:
            config = _recipe(data, method, eval_every=_EVAL_EVERY, **given)
            results[method] = train(config, out / method, root=root, resume=True, observer=progress)
        console.print()
    test_set = datasets.load(config.data, root, "test")
    rows: dict[str, dict[str, Any]] = {
        method: {"epochs": len(result.rows), **{name: result.rows[-1][name] for name in _KEPT}}
        for method, result in results.items()
    }
    console.print("measuring steps ...", style="dim")
    costs = _costs(config, results["standard"], datasets.load(config.data, root, "train"))
    for method in _METHODS:
        rows[method]["step"] = {
            impl: dataclasses.asdict(costs[f"{method}, {impl}"]) for impl in ("reference", "kernel")
        }
    networks = {_ROW_NAMES[method]: result.model for method, result in results.items()}
    figures.gradients(out / "gradients.png", test_set, networks)
    figures.curves(out / "curves.png", {method: result.rows for method, result in results.items()}, config.eps)
    record = {"data": config.data, "eps": config.eps, "model": config.model, "rows": rows}
    write_atomically(out / "results.json", json.dumps(record, indent=2) + "\n")
    console.print(_table(config, rows))
    say(
        console,
        f"{terminal(out)}/gradients.png shows what each network looks at, {terminal(out)}/curves.png how it got there "
        f"({time.perf_counter() - started:.0f} s in all).",
    )
    return rows


def _recipe(data: str, method: str, **given: Any) -> TrainingConfig:
    """Both recipes differ in the penalty alone: the other loss has the same smooth labels."""
    if method == "standard":
        given["options"] = {"label_smoothing": recipe(data, "gradient-penalty").options["label_smoothing"]}
    return recipe(data, method, **given)


def _costs(config: TrainingConfig, standard: Result, train_set: datasets.Dataset) -> dict[str, step_cost.StepCost]:
    """The step costs of both methods, each with PyTorch's own operators and with the fused ones."""
    x, y = train_set.images[: config.batch_size], train_set.labels[: config.batch_size]
    kernel = "kernel" if _library.extension() is not None else "auto"
    losses = {}
    for method in _METHODS:
        options = _recipe(config.data, method).options
        for column, impl in (("reference", "reference"), ("kernel", kernel)):
            losses[f"{method}, {column}"] = build_loss(method, options, eps=config.eps, impl=impl)
    with cpu_threads(config.threads):
        return step_cost.measure(standard.model, x, y, losses, baseline="standard, reference")


def _table(config: TrainingConfig, rows: dict[str, dict[str, Any]]) -> Table:
    attack = f"attacked by PGD-{config.pgd_steps} in the Linf ball of {figures.eps_text(config.eps)}"
    table = Table(title=f"{terminal(config.data)}, {attack}")
    table.add_column("trained with", no_wrap=True)
    for head in ("clean", "attacked", "stock PyTorch", "robustkern"):
        table.add_column(head, justify="right", no_wrap=True)
    for method, row in rows.items():
        cells = [f"{100 * row['clean_accuracy']:.1f} %", f"{100 * row['robust_accuracy']:.1f} %"]
        for impl in ("reference", "kernel"):
            step = row["step"][impl]
            cells.append(f"{step['milliseconds']:.1f} ms  {step['ratio']:.2f}x")
        table.add_row(_ROW_NAMES[method].replace("\n", " "), *cells)
    table.caption = "accuracy on test images; time of a step, and how many times the stock step without penalty"
    if _library.extension() is None:
        reason = _library.why_unavailable()
        table.caption += f"\nthe extension is not loaded, both times are plain PyTorch's: {terminal(reason)}"
    return table
