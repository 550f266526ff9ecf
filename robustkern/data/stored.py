"""Data sets that are read while they are used: image folders, `.npy` arrays, shards, and those in one file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustkern._packages import pip_install

from .dataset import DataError, Dataset
from .decode import View
from .folder import opened
from .index import FolderIndex, folder_index
from .shards import shard_source
from .streamed import Source, StreamedDataset, streamed

_IMAGES, _LABELS, _CLASSES = "images.npy", "labels.npy", "classes.txt"


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder."""

    index: FolderIndex

    def __len__(self) -> int:
        return len(self.index)

    def opened(self, number: int) -> AbstractContextManager[Any]:
        return opened(self.index.path(number))

    def name(self, number: int) -> Path:
        return self.index.path(number)


@dataclass(frozen=True)
class ArraySource:
    """Images in an array of bytes, which may be mapped from a file.

    Attributes:
        path: What messages call it.
        images: [N, H, W], [N, H, W, C] or [N, C, H, W], with one or three channels.
    """

    path: str
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def opened(self, number: int) -> AbstractContextManager[Any]:
        from PIL import Image

        image = np.asarray(self.images[number])
        if image.ndim == 3:
            image = image if image.shape[2] in (1, 3) else image.transpose(1, 2, 0)
            image = image[:, :, 0] if image.shape[2] == 1 else image
        return nullcontext(Image.fromarray(np.ascontiguousarray(image)))

    def name(self, number: int) -> str:
        return f"{self.path}, image {number}"


def stream_folder(root: Path, split: str, view: View, channels: int = 0, workers: int = 0) -> StreamedDataset:
    """A split in a folder, read while it is used. Its subfolder `train`, and `test` or `val`, holds one of these:

    - `<class>/*.jpg`: images of any sizes; what a file may be is as for `load_folder`, and 16 bits become 8.
    - `images.npy` and `labels.npy`: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], and integers [N].
    - `*.tar`: shards of WebDataset, whose samples have an image and a `.cls`.

    The classes of arrays and shards are called by their numbers, or by the lines of `classes.txt` in the folder.

    Raises:
        DataError: The folder holds none of them, something in it is damaged, or Pillow is not installed.
    """
    need_pillow()
    if split == "test" and not (root / split).is_dir() and (root / "val").is_dir():
        split = "val"
    source: Source
    if (root / split / _IMAGES).is_file():
        source, numbers = _arrays(root / split)
        classes = _named_classes(root, split, numbers, lambda: _arrays(root / "train")[1])
    elif (shards := shard_source(root, split)) is not None:
        source, numbers = shards, shards.labels

        def of_training() -> np.ndarray:
            found = shard_source(root, "train")
            return numbers if found is None else found.labels

        classes = _named_classes(root, split, numbers, of_training)
    else:
        index = folder_index(root, split)
        source, numbers, classes = FolderSource(index), index.labels, index.classes
    labels = torch.from_numpy(np.array(numbers, np.int64))
    return streamed(str(root), source, labels, classes, view, channels, workers)


def stream_dataset(data: Dataset, view: View, channels: int = 0, workers: int = 0) -> StreamedDataset:
    """A data set of bytes that is in memory, each image v / 255, as one that is read: at another size, with crops."""
    need_pillow()
    pixels = (data.images * 255).round_().byte().movedim(1, 3).contiguous().numpy()
    return streamed(data.name, ArraySource(data.name, pixels), data.labels, data.classes, view, channels, workers)


def need_pillow() -> None:
    """DataError if Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"reading images needs Pillow: {pip_install('PIL')}") from error


def _arrays(folder: Path) -> tuple[ArraySource, np.ndarray]:
    found = []
    for path in (folder / _IMAGES, folder / _LABELS):
        try:
            found.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not an array that can be read ({error})") from error
    images, labels = found
    channels = images.ndim == 3 or (images.ndim == 4 and ({images.shape[1], images.shape[3]} & {1, 3}))
    if images.dtype != np.uint8 or not channels or not images.size:
        raise DataError(
            f"{folder / _IMAGES}: must be uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(
            f"{folder / _LABELS}: must be {len(images)} integers from 0 on, got {labels.dtype} {list(labels.shape)}"
        )
    return ArraySource(str(folder / _IMAGES), images), labels


def _named_classes(
    root: Path, split: str, labels: np.ndarray, of_training: Callable[[], np.ndarray]
) -> tuple[str, ...]:
    """Names by the lines of `classes.txt`, or as many numbers as the training set has classes."""
    path = root / _CLASSES
    if path.is_file():
        names = tuple(path.read_text(errors="surrogateescape").split("\n"))
        names = names[:-1] if names and not names[-1] else names
    else:
        known = labels if split == "train" or not (root / "train").is_dir() else of_training()
        names = tuple(str(label) for label in range(int(known.max()) + 1))
    if len(names) < 2 or int(labels.max()) >= len(names):
        raise DataError(f"{root / split}: a label {int(labels.max())} among {len(names)} classes")
    return names
