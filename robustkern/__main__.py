"""`python -m robustkern` and the `robustkern` command."""

import importlib.util
import sys

from robustkern._packages import pip_install

_EXTRAS = ("typer", "rich", "matplotlib", "sklearn", "safetensors", "yaml")


def main() -> None:
    """Run the command line. `info` needs PyTorch alone; everything else needs the packages of the extra `train`."""
    from robustkern._text import loosen_streams

    loosen_streams()
    arguments = sys.argv[1:]
    if arguments[:1] == ["info"] and not {"-h", "--help"} & set(arguments):
        from robustkern.cli.info import run

        sys.exit(run(arguments[1:]))
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"robustkern: {', '.join(missing)} not installed: {pip_install(*missing)}", file=sys.stderr)
        sys.exit(1)
    from robustkern.cli.app import app

    app(prog_name="robustkern")


if __name__ == "__main__":
    main()
