"""The index of an image folder: which files it has, in arrays, made once and kept.

A file of an image is not looked at, and no folder is read twice while its time of change stays the same: a million
images take seconds, and a few bytes each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustkern._text import plain

from .dataset import DataError, DataWarning
from .folder import SUFFIXES, entries

_FORMAT = 1
_SETTLED = 2_000_000_000  # ns: a folder that changed so short a time ago may change again at the same time of change


@dataclass(frozen=True)
class FolderIndex:
    """The images of a split.

    Attributes:
        folder: The folder of the split, `DIR/train`.
        classes: Names of the classes, in the order of the labels.
        labels: int16 or int32.  [N]
        names: The bytes of all file names, one after the other.
        ends: Where each name ends there.  [N] int64
        skipped: How many files and folders are no images.
    """

    folder: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, number: int) -> Path:
        """The file of an image."""
        begin = int(self.ends[number - 1]) if number else 0
        name = os.fsdecode(self.names[begin : int(self.ends[number])].tobytes())
        return self.folder / self.classes[int(self.labels[number])] / name


def folder_index(root: Path, split: str) -> FolderIndex:
    """The index of `root/split`, read from its file if no folder has changed since, else made and written.

    The file is `.robustkern-index-<split>.npz` in `root`, or, where nothing can be written there, in the user's cache
    folder. Without either, the index is made anew each time.

    Raises:
        DataError: There are fewer than two classes, a class of `train/` without an image, or a class of another split
            that `train/` does not have.
    """
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; an image folder has train/ and test/, each with one folder per class")
    base = root / "train" if (root / "train").is_dir() else folder
    classes = tuple(entries(base)[0])
    if len(classes) < 2:
        raise DataError(f"{base}: needs at least two class folders, has {len(classes)}")
    inside = classes if folder == base else tuple(entries(folder)[0])
    if strangers := set(inside) - set(classes):
        raise DataError(f"{folder}: class {min(strangers)} does not occur in {base}")
    present = [(label, name) for label, name in enumerate(classes) if name in set(inside)]
    times = [_changed(folder), *(_changed(folder / name) for _, name in present)]
    state = json.dumps([_FORMAT, [os.fsencode(name).hex() for _, name in present], classes != inside, times])
    places = _places(root, split)
    for place in places:
        if (found := _read(place, folder, classes, state)) is not None:
            _tell(found)
            return found
    started = time.time_ns()
    made = _scan(folder, classes, present, complete=folder == base)
    _tell(made)
    if started - max(times) > _SETTLED:
        _keep(places, made, state)
    return made


def _changed(folder: Path) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error


def _scan(folder: Path, classes: tuple[str, ...], present: list[tuple[int, str]], complete: bool) -> FolderIndex:
    names: list[bytes] = []  # of a class, in one piece
    ends: list[np.ndarray] = []
    counts = np.zeros(len(classes), np.int64)
    skipped, total = 0, 0
    for label, name in present:
        found = []
        try:
            with os.scandir(folder / name) as files:
                for entry in files:
                    # No look at the file itself: a link may lead anywhere, and a million looks take a minute.
                    if entry.name.startswith("."):
                        continue
                    if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir(follow_symlinks=False):
                        found.append(os.fsencode(entry.name))
                    else:
                        skipped += 1
        except OSError as error:
            raise DataError(f"{folder / name}: {error.strerror or error}") from error
        found.sort()
        counts[label] = len(found)
        names.append(b"".join(found))
        ends.append(total + np.cumsum(np.fromiter(map(len, found), np.int64, len(found))))
        total += len(names[-1])
    for label, name in enumerate(classes):
        if complete and not counts[label]:
            raise DataError(f"{folder / name}: a class without an image ({', '.join(SUFFIXES)})")
    if not counts.sum():
        raise DataError(f"{folder}: no images in its class folders ({', '.join(SUFFIXES)})")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return FolderIndex(folder, classes, labels, np.frombuffer(b"".join(names), np.uint8), np.concatenate(ends), skipped)


def _tell(index: FolderIndex) -> None:
    if index.skipped:
        is_are = "is" if index.skipped == 1 else "are"
        warnings.warn(
            f"{plain(str(index.folder))}: skipped {index.skipped} that {is_are} no image in the folder of a class",
            DataWarning,
            stacklevel=5,
        )


def _places(root: Path, split: str) -> list[Path]:
    """Where the index may be, in this order."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustkern"
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    return [root / f".robustkern-index-{split}.npz", cache / f"index-{name}-{split}.npz"]


def _read(place: Path, folder: Path, classes: tuple[str, ...], state: str) -> FolderIndex | None:
    """The index in a file, if it is one of these folders as they are now."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if stored["state"].tobytes() != state.encode():
                return None
            labels, names, ends = stored["labels"], stored["names"], stored["ends"]
            skipped, check = int(stored["skipped"]), stored["check"].tobytes()
    except Exception:  # missing, damaged, or somebody else's: it is made anew
        return None
    found = FolderIndex(folder, classes, labels, names, ends, skipped)
    return found if check == _check(found) else None


def _keep(places: list[Path], index: FolderIndex, state: str) -> None:
    texts = {"state": state.encode(), "check": _check(index)}
    arrays: dict[str, Any] = {name: np.frombuffer(content, np.uint8) for name, content in texts.items()}
    arrays.update(labels=index.labels, names=index.names, ends=index.ends, skipped=np.int64(index.skipped))
    for place in places:
        with contextlib.suppress(OSError):
            if place != places[0]:
                place.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".tmp-index-", suffix=".npz", dir=place.parent)
            try:
                os.fchmod(descriptor, 0o644)  # another user of the folder may read it too
                with os.fdopen(descriptor, "wb") as file:
                    np.savez(file, **arrays)
                os.replace(temporary, place)
            except BaseException:
                os.unlink(temporary)
                raise
            return


def _check(index: FolderIndex) -> bytes:
    """SHA-256 of the arrays."""
    found = hashlib.sha256()
    for array in (index.labels, index.names, index.ends):
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.digest()
