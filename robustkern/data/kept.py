"""Arrays that were worked out from files once, kept beside them or in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def places(root: Path, name: str) -> list[Path]:
    """Where arrays about a folder may be, in this order."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustkern"
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return [root / f".robustkern-{name}.npz", cache / f"{key}-{name}.npz"]


def read_arrays(place: Path, state: str, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The arrays in a file, if they were worked out from files in this state; None if not, or if it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if stored["state"].tobytes() != state.encode():
                return None
            found = {name: stored[name] for name in names}
            return found if stored["check"].tobytes() == _check(found) else None
    except Exception:  # missing, damaged, or somebody else's
        return None


def keep_arrays(where: list[Path], state: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to the first of these places where that is possible, atomically."""
    texts = {"state": state.encode(), "check": _check(arrays)}
    content: dict[str, Any] = {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
    for place in where:
        with contextlib.suppress(OSError):
            if place != where[0]:
                place.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".tmp-index-", suffix=".npz", dir=place.parent)
            try:
                os.fchmod(descriptor, 0o644)  # another user of the folder may read it too
                with os.fdopen(descriptor, "wb") as file:
                    np.savez(file, **{**content, **arrays})
                os.replace(temporary, place)
            except BaseException:
                os.unlink(temporary)
                raise
            return


def _check(arrays: dict[str, np.ndarray]) -> bytes:
    """SHA-256 of the arrays."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.digest()
