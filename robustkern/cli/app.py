"""The program and its commands.

Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped by SIGINT or SIGTERM with everything saved, so that a batch
system can start the same command again with `--resume`.
"""

from typing import Annotated

import typer

from robustkern._version import __version__

from .demo import demo_command
from .doctor import doctor_command
from .errors import OneLineErrors
from .evaluate import evaluate_command
from .info import info_command
from .study import study_command
from .train import train_command

app = typer.Typer(
    name="robustkern",
    cls=OneLineErrors,
    help="Robust training with fused second derivatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train_command)
app.command("demo")(demo_command)
app.command("evaluate")(evaluate_command)
app.command("study")(study_command)
app.command("info")(info_command)
app.command("doctor")(doctor_command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"robustkern {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Robust training with fused second derivatives."""
