"""The two ways in which training refuses; each message is one sentence for the user."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for makes no sense; the command line exits with 2."""


class TrainingError(RuntimeError):
    """Training cannot go on; the command line exits with 1."""


class Interrupted(Exception):
    """A signal asked the run to stop, and its state was saved.

    Attributes:
        done: How far it came.
        further: What goes on from there.
    """

    def __init__(self, done: str, further: str = "--resume goes on from there") -> None:
        super().__init__(done, further)
        self.done, self.further = done, further

    def __str__(self) -> str:
        return f"{self.done}; {self.further}"
