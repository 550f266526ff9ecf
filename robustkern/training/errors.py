"""The two ways in which training refuses; each message is one sentence for the user."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for makes no sense; the command line exits with 2."""


class TrainingError(RuntimeError):
    """Training cannot go on; the command line exits with 1."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state was saved and `--resume` goes on from there."""
