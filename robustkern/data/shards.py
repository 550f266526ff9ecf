"""Shards of WebDataset: tar files whose members `KEY.jpg` and `KEY.cls` are one sample. They are read by place.

Where each image is in its shard is worked out once and kept. So the order of the samples is as free as that of files,
and a run is resumed exactly, which a stream through buffers that shuffle cannot promise.
"""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustkern._text import brief

from .dataset import DataError
from .folder import MOST_BYTES, SUFFIXES, opened
from .kept import keep_arrays, places, read_arrays

_FORMAT = 1
_ARRAYS = ("labels", "shard", "begin", "size")
_MOST_CLASSES = 1 << 20


@dataclass(frozen=True)
class ShardSource:
    """Images in tar files.

    Attributes:
        files: The shards.
        labels: [N] int64
        shard: Which one each image is in.  [N] int32
        begin: Where it begins there.  [N] int64
        size: Its bytes.  [N] int64
    """

    files: tuple[Path, ...]
    labels: np.ndarray
    shard: np.ndarray
    begin: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        return f"{self.files[int(self.shard[number])]}, the image at byte {int(self.begin[number])}"

    @contextmanager
    def opened(self, number: int) -> Iterator[Any]:
        path = self.files[int(self.shard[number])]
        try:
            with open(path, "rb") as file:
                file.seek(int(self.begin[number]))
                content = file.read(int(self.size[number]))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        with opened(self.name(number), io.BytesIO(content)) as image:
            yield image


def shard_source(root: Path, split: str) -> ShardSource | None:
    """The samples of `root/split/*.tar`; None if there is no such file.

    Raises:
        DataError: A shard is damaged, or a sample has no image, more than one, or no label.
    """
    files = tuple(sorted((root / split).glob("*.tar")))
    if not files:
        return None
    stats = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    state = json.dumps([_FORMAT, stats])
    where = places(root, f"shards-{split}")
    for place in where:
        if (arrays := read_arrays(place, state, _ARRAYS)) is not None:
            return ShardSource(files, **arrays)
    found: dict[str, Any] = {"labels": array("q"), "shard": array("i"), "begin": array("q"), "size": array("q")}
    for number, file in enumerate(files):
        for label, begin, size in _samples(file):
            for name, value in zip(_ARRAYS, (label, number, begin, size), strict=True):
                found[name].append(value)
    arrays = {name: np.frombuffer(values, values.typecode) for name, values in found.items()}
    keep_arrays(where, state, arrays)
    return ShardSource(files, **arrays)


def _samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """Label, place and size of each image; the members of a sample follow each other."""
    key, image, label = None, None, None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined] # it would remember all of them
                folder, _, name = member.name.rpartition("/")
                base, _, kind = name.partition(".")
                if not member.isfile() or not base:
                    continue
                if (folder, base) != key:
                    if key is not None:
                        yield _sample(path, key, image, label)
                    key, image, label = (folder, base), None, None
                if kind.lower() == "cls":
                    label = _label(path, archive.extractfile(member), member)
                elif f".{kind.lower()}".endswith(SUFFIXES):
                    if image is not None:
                        raise DataError(f"{path}: sample {brief(base)} has two images")
                    if member.size > MOST_BYTES or member.issparse():
                        raise DataError(
                            f"{path}: {brief(member.name)} is larger than {MOST_BYTES >> 20} MiB, or sparse"
                        )
                    image = member.offset_data, member.size
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a tar file that can be read ({brief(error)})") from error
    if key is not None:
        yield _sample(path, key, image, label)


def _sample(path: Path, key: tuple[str, str], image: tuple[int, int] | None, label: int | None) -> tuple[int, int, int]:
    if image is None or label is None:
        raise DataError(f"{path}: sample {brief('/'.join(filter(None, key)))} has no image, or no .cls with its class")
    return label, *image


def _label(path: Path, file: Any, member: Any) -> int:
    text = file.read(32).strip() if file is not None and member.size <= 32 else b""
    if not text.isdigit() or int(text) >= _MOST_CLASSES:
        raise DataError(f"{path}: {brief(member.name)} is no number of a class from 0 on")
    return int(text)
