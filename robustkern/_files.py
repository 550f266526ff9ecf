"""Reads files from unknown sources: only regular files of bounded size, and JSON of bounded depth with unique keys."""

import errno
import json
import os
import stat
from typing import IO, Any


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file for reading; OSError for a pipe or a device, which may never end."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file; OSError if it cannot be read, is not regular, or is larger than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than the {most} bytes that such a file may have", os.fspath(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: It is not JSON, is nested too deeply or has a key twice.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return values

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except RecursionError:
        raise ValueError("nested too deeply") from None
