"""The index of an image folder: which files it has, in arrays, made once and kept.

A file of an image is not looked at, and no folder is read twice while its time of change stays the same: a million
images take seconds, and a few bytes each.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustkern._text import plain

from .dataset import DataError, DataWarning
from .folder import SUFFIXES, base_of, class_folders
from .kept import keep_arrays, places, read_arrays

_FORMAT = 1
_ARRAYS = ("labels", "names", "ends", "skipped")
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
    folder, base = root / split, base_of(root, split)
    classes, folders, _ = class_folders(folder, base)
    inside = set(folders)
    present = [(label, name) for label, name in enumerate(classes) if name in inside]
    times = [_changed(folder), *(_changed(folder / name) for _, name in present)]
    # With the numbers of the classes: one more in train/ moves those behind it.
    state = json.dumps([_FORMAT, [(label, os.fsencode(name).hex()) for label, name in present], times])
    where = places(root, f"index-{split}")
    for place in where:
        arrays = read_arrays(place, state, _ARRAYS)
        if arrays is not None:
            labels, names, ends, skipped = (arrays[name] for name in _ARRAYS)
            found = FolderIndex(folder, classes, labels, names, ends, int(skipped))
            _tell(found)
            return found
    started = time.time_ns()
    made = _scan(folder, classes, present, complete=folder == base)
    _tell(made)
    if started - max(times) > _SETTLED:
        keep_arrays(where, state, {name: np.asarray(getattr(made, name)) for name in _ARRAYS})
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
