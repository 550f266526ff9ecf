"""How a training run looks on a terminal: a bar with the time left, and one row per epoch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from robustkern import training
from robustkern._text import terminal
from robustkern.training import TrainingConfig
from robustkern.training.figures import eps_text

_COLUMNS = "{:>7}{:>13}{:>12}{:>9}{:>9}{:>10}"


def say(console: Console, text: str, **style: Any) -> None:
    """Print a line as it is: Rich neither colours nor breaks it."""
    console.print(text, highlight=False, soft_wrap=True, **style)


def bar(console: Console, *columns: Any, **options: Any) -> Progress:
    """A bar that names the work in progress, on a terminal only."""
    name = TextColumn("{task.description}")
    return Progress(name, *columns, console=console, transient=True, disable=not console.is_terminal, **options)


class TrainingProgress(training.Observer):
    """Shows a run, or several runs one after the other."""

    def __init__(self, console: Console, *, every: int = 1) -> None:
        """Args:
        console: Where to write.
        every: Show the row of every so-many-th epoch, and always the last.
        """
        self._console = console
        self._every = every
        done, left = (MofNCompleteColumn(), TextColumn("steps,")), (TimeRemainingColumn(), TextColumn("left"))
        self._bar = bar(console, BarColumn(bar_width=None), *done, *left, expand=True)
        self._task: TaskID | None = None
        self._epochs = 0
        self._prefix = ""

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def on_start(self, config: TrainingConfig, steps_per_epoch: int, progress: training.Progress) -> None:
        options = "".join(
            f", {name.replace('_', ' ')} {terminal(value) if isinstance(value, str) else format(value, 'g')}"
            for name, value in config.options.items()
            if value
        )
        say(
            self._console,
            f"[bold]{config.method}[/bold] on {terminal(config.data)}: {config.model}, {config.epochs} epochs of "
            f"{steps_per_epoch} steps, eps {eps_text(config.eps)}{options}",
        )
        if progress.step:
            say(self._console, f"going on after step {progress.step}")
        self._prefix = "validation_" if config.validation else ""
        if config.validation:
            self._console.print("accuracies are those on the images held out for validation", style="dim")
        heads = ("epoch", "orientation", "smoothness", "clean", f"PGD-{config.pgd_steps}", "ms/step")
        say(self._console, _COLUMNS.format(*heads), style="dim")
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._epochs = config.epochs
        total = config.epochs * steps_per_epoch
        self._task = self._bar.add_task("training", total=total, completed=progress.step)
        for row in progress.rows[-1:]:
            self.on_epoch(row)

    def on_step(self, progress: training.Progress) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=progress.step)

    def on_epoch(self, row: training.Row) -> None:
        epoch = int(row["epoch"] or 0)
        if epoch % self._every and epoch != self._epochs:
            return
        skipped = f"  ({row['skipped']:.0f} steps skipped: not finite)" if row["skipped"] else ""
        clean, robust = row[f"{self._prefix}clean_accuracy"], row[f"{self._prefix}robust_accuracy"]
        line = _COLUMNS.format(
            f"{epoch}/{self._epochs}",
            *("" if row[term] is None else f"{row[term]:.4f}" for term in ("orientation", "smoothness")),
            "" if clean is None else f"{100 * clean:.1f} %",
            "" if robust is None else f"{100 * robust:.1f} %",
            f"{row['ms_per_step']:.1f}",
        )
        say(self._console, line + skipped)

    def on_message(self, message: str) -> None:
        say(self._console, f"[yellow]{terminal(message)}[/yellow]")
