"""Sources of images that are read by number: files of a folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustkern._packages import pip_install

from .dataset import DataError
from .decode import View
from .folder import opened
from .index import FolderIndex, folder_index
from .streamed import StreamedDataset, streamed


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


def stream_folder(root: Path, split: str, view: View, channels: int = 0, workers: int = 0) -> StreamedDataset:
    """A split of an image folder, read while it is used: images of any sizes, `root/train/<class>/*.jpg`.

    What a file may be is as for `robustkern.data.folder.load_folder`; 16 bits become 8. Instead of `test/` there may be
    `val/`.

    Raises:
        DataError: The folder is none of images in classes, or Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"reading image folders needs Pillow: {pip_install('PIL')}") from error
    if split == "test" and not (root / split).is_dir() and (root / "val").is_dir():
        split = "val"
    index = folder_index(root, split)
    source, labels = FolderSource(index), torch.from_numpy(index.labels).long()
    return streamed(str(root), source, labels, index.classes, view, channels, workers)
