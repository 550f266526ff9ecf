"""A benchmark in a process of its own, started again without the column that ended it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from . import harness

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL}


class Progress:
    """What a benchmark is doing and what it has finished, kept in a file that survives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = json.loads(path.read_text()) if path.exists() else {"at": None, "crashed": [], "finished": []}

    def enter(self, case: str, column: str = "") -> None:
        """`column` "" stands for the timing of all columns together."""
        self._write(at=[case, column])

    def finish(self, case: str) -> None:
        self._write(at=None, finished=[*self.state["finished"], case])

    def crash(self, reason: str) -> None:
        """Notes that what was entered last ended the process."""
        self._write(at=None, crashed=[*self.state["crashed"], [*self.state["at"], reason]])

    def is_finished(self, case: str) -> bool:
        return case in self.state["finished"]

    def why_left_out(self, case: str, column: str) -> str | None:
        """The reason why a column is not to be tried again."""
        for where, what, reason in self.state["crashed"]:
            if where == case and what in ("", column):
                return f"left out: {reason} in {what or 'the timing'}"
        return None

    def _write(self, **changes: object) -> None:
        self.state.update(changes)
        harness.write_atomically(self.path, json.dumps(self.state))


def supervise(module: str, arguments: list[str]) -> int:
    """Runs `python -m module arguments --progress FILE` until it ends by itself; gives its status, 1 after a crash."""
    with tempfile.TemporaryDirectory() as folder:
        path, crashed = Path(folder) / "progress.json", False
        while True:
            command = [sys.executable, "-m", module, *arguments, "--progress", str(path)]
            status = subprocess.run(command, cwd=harness.ROOT).returncode
            if -status not in _CRASHES:
                return status or int(crashed)
            progress, crashed = Progress(path), True
            if progress.state["at"] is None:
                return 1
            reason = f"ended by {signal.Signals(-status).name}"
            print(f"{': '.join(filter(None, progress.state['at']))}: {reason}; going on without it", file=sys.stderr)
            progress.crash(reason)
