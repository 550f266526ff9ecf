"""Writes files so that each is always the old version or the new one; reserves a folder for one process."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

from robustkern._text import brief

from .errors import TrainingError, UsageError, require

_TEMPORARY, _LOCK = ".tmp-", ".lock"
# Temporary names of files that we write; their end comes from `tempfile.mkstemp`.
_STALE = re.compile(r"\.tmp-(probe|[\w-]+\.(yaml|jsonl?|pt|safetensors|png|html|md))-[a-z0-9_]{8}")
_OWNER = re.compile(rb"\s*\d*\s*")


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Replace a file in one step: a reader, or a crash at any moment, sees the old content or the new, never a part.

    Args:
        path: The file.
        content: Bytes, text, or a function that writes to the binary file it is given.
    """
    # In the same directory: a rename is atomic only within one file system.
    descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY + path.name + "-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp made it readable for its owner alone.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Make renames and removals in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def names_in(folder: Path) -> list[str]:
    """Names in a folder, without our lock and our temporary files, which a process that died may have left."""
    return sorted(path.name for path in folder.iterdir() if path.name != _LOCK and not _STALE.fullmatch(path.name))


def refuse_foreign(folder: Path, ours: Collection[str], kind: str, marker: str | None = None) -> None:
    """UsageError if a folder is there and is neither empty nor one that we wrote.

    Args:
        folder: The folder.
        ours: Names of what we write into it.
        kind: What we call such a folder.
        marker: If this file is there, anything else may be there too.
    """
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file, not a folder")
    names = names_in(folder) if folder.exists() else []
    strange = [name for name in names if name not in ours] if marker not in names else []
    if strange:
        raise UsageError(f"{folder} is neither empty nor {kind}, it holds {brief(strange[0])}: choose another folder")


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of writers that were killed. Only for the process that holds the folder's lock."""
    for path in folder.iterdir():
        if _STALE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def make_writable(folder: Path) -> None:
    """Make a folder if it is not there, and check now whether files can be written into it.

    Raises:
        OSError: They cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{_TEMPORARY}probe-", dir=folder)
    os.close(descriptor)
    os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class RunLock:
    """The right to write into a folder of ours; the system takes it back when the process ends, however it ends.

    A lock file that is a link is not followed; one that holds anything but the number of a process stays as it is.

    Raises:
        UsageError: Another process has it, or the file is none of ours.
        TrainingError: The file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        path = self._folder / _LOCK
        try:
            # O_NONBLOCK: a pipe would wait for somebody at its other end.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise UsageError(f"{path} is no file of ours, but a link or something else") from error
            raise
        try:
            status = os.fstat(descriptor)
            content = os.pread(descriptor, 64, 0) if stat.S_ISREG(status.st_mode) else b"?"
            if status.st_nlink > 1 or not _OWNER.fullmatch(content):
                raise UsageError(f"{path} is no file of ours: it holds something else than the number of a process")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = content.decode().strip() or "unknown"
                raise UsageError(f"{self._folder} is in use by another process (pid {owner})") from error
            except OSError as error:
                reason = f"cannot be locked ({error.strerror}): its file system has no locks, choose another folder"
                raise TrainingError(f"{path} {reason}") from error
            os.pwrite(descriptor, f"{os.getpid():<20}\n".encode(), 0)  # over any number that was there before
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
