"""Errors of the command line: each is one line on stderr and an exit status."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from robustkern._text import brief, loosen_streams, plain
from robustkern.data import DataError, DataWarning
from robustkern.training import Interrupted, TrainingError, UsageError

FAILED, WRONG_USE, STOPPED = 1, 2, 75

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer contains a copy of click, or imports the package


class OneLineErrors(TyperGroup):
    """Commands that answer wrong use with one line on stderr, which names the option, and exit status 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        if not extra.get("standalone_mode", True):
            return super().main(*args, **extra)
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is its message
                error.show()
            elif os.environ.get("RANK", "0") == "0":  # all processes have the same error: the first prints it
                print_error(" ".join(error.format_message().split()))
            status = error.exit_code
        sys.exit(status or 0)


def print_error(sentence: str) -> None:
    """Prints a sentence to stderr, on one line, whatever it quotes."""
    print(f"robustkern: {brief(sentence, 1000)}", file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors that a user can correct into one line on stderr and an exit status, and warnings into one line."""
    rank = os.environ.get("RANK", "0")
    told: set[str] = set()  # a study loads its data for every model

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, DataWarning):
            before(message, category, *where, **more)
        elif rank == "0" and str(message) not in told:
            told.add(str(message))
            print(f"robustkern: {plain(message)}", file=sys.stderr)

    loosen_streams()
    try:
        with warnings.catch_warnings():
            before, warnings.showwarning = warnings.showwarning, show
            yield
    except UsageError as error:
        status, message = WRONG_USE, str(error)
    except (DataError, TrainingError) as error:
        status, message = FAILED, str(error)
    except Interrupted as error:
        status, message = STOPPED, str(error)
    except OSError as error:
        status, message = FAILED, f"{error.filename2 or error.filename or ''}: {error.strerror or error}".lstrip(": ")
    else:
        return
    if rank == "0" or status == FAILED:
        print_error(message)
    raise typer.Exit(status)
