"""The two ways in which training refuses; each message is one sentence for the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(ValueError):
    """What was asked for makes no sense; the command line exits with 2."""


class TrainingError(RuntimeError):
    """Training cannot go on; the command line exits with 1."""


class Interrupted(Exception):
    """A signal asked the run to stop, and its state was saved.

    Attributes:
        done: How far the run got.
        further: How to go on from there.
    """

    def __init__(self, done: str, further: str = "--resume goes on from there") -> None:
        super().__init__(done, further)
        self.done, self.further = done, further

    def __str__(self) -> str:
        return f"{self.done}; {self.further}"


def require(condition: bool, message: str) -> None:
    """UsageError unless the condition holds."""
    if not condition:
        raise UsageError(message)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError or a ValueError becomes a UsageError that names the path."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
