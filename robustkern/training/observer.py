"""What a run tells whoever watches it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .checkpoint import Progress, Row
from .config import TrainingConfig


class Observer:
    """What a run tells an observer; override what is of interest.  Of several processes, only the first tells.

    >>> from robustkern.training import Observer
    >>> class Rows(Observer):
    ...     def on_epoch(self, row):
    ...         print(row["epoch"])
    >>> Rows().on_epoch({"epoch": 3})
    3
    """

    def on_start(self, config: TrainingConfig, steps_per_epoch: int, progress: Progress) -> None:
        """Training begins, or goes on, at `progress`."""

    def on_step(self, progress: Progress) -> None:
        """A step was taken."""

    def on_evaluation(self) -> None:
        """A batch of the evaluation was done."""

    def on_epoch(self, row: Row) -> None:
        """An epoch has ended with these metrics."""

    def on_message(self, message: str) -> None:
        """Something the user should know."""

    def on_end(self) -> None:
        """The run is over, finished or not."""


class Observers(Observer):
    """Several observers, told one after the other.

    >>> from robustkern.training import Observer, Observers
    >>> Observers(Observer(), Observer()).on_message("hello")
    """

    def __init__(self, *observers: Observer) -> None:
        for name in vars(Observer):
            if name.startswith("on_"):
                setattr(self, name, partial(_tell, [getattr(observer, name) for observer in observers]))


def _tell(them: Sequence[Callable[..., None]], *what: Any) -> None:
    for tell in them:
        tell(*what)
