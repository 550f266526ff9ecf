"""Files that anybody may have written: regular ones, of a bounded size; JSON of a bounded depth, no key twice."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """What a regular file holds.

    Args:
        path: The file. A pipe or a device, which may never end, is refused.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read, is larger or no regular file.
    """
    # Without O_NONBLOCK a pipe that nobody writes to would wait for ever before it could be seen to be one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than the {most} bytes that such a file may have", os.fspath(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """A JSON document.

    Raises:
        ValueError: It is none, is nested too deeply or has a key twice.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return values

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except RecursionError:
        raise ValueError("nested too deeply") from None
