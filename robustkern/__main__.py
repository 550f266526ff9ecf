"""`python -m robustkern` and the `robustkern` command."""

import importlib
import importlib.util
import sys

from robustkern._packages import pip_install

_EXTRAS = ("typer", "rich", "matplotlib", "sklearn", "safetensors", "yaml")


def main() -> None:
    """Run the command line. `info`, `doctor` and `--version` need PyTorch alone, all else the extra `train`."""
    from robustkern._text import loosen_streams

    loosen_streams()
    arguments = sys.argv[1:]
    if arguments[:1] in (["info"], ["doctor"]) and not {"-h", "--help"} & set(arguments):
        sys.exit(importlib.import_module(f"robustkern.cli.{arguments[0]}").run(arguments[1:]))
    if arguments == ["--version"]:
        from robustkern._version import __version__

        print(f"robustkern {__version__}")
        return
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"robustkern: {', '.join(missing)} not installed: {pip_install(*missing)}", file=sys.stderr)
        sys.exit(1)
    from robustkern.cli.app import app

    app(prog_name="robustkern")


if __name__ == "__main__":
    main()
