"""Data sets, in memory or read while they are used: `load(name, root, split)`.

Names: `digits` (scikit-learn's, embedded), `digits-28` (the same, enlarged), `mnist` and `fashion-mnist` (IDX files),
`cifar10` (the published archive's files), or the path of a folder of images. `stream` reads larger
folders while they are used. A missing data set raises a
`DataError` that says how to get it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from robustkern._packages import pip_install

from .augment import BatchAugmentation, Mixing
from .cifar import load_cifar10
from .dataset import DataError, Dataset, DataWarning
from .decode import View
from .folder import load_folder
from .idx import load_idx
from .randomness import CropFlip, epoch_order, generator
from .stored import stream_dataset, stream_folder
from .streamed import Reader, StreamedDataset, as_images, joined

__all__ = [
    "NAMES",
    "BatchAugmentation",
    "CropFlip",
    "DataError",
    "DataWarning",
    "Dataset",
    "Images",
    "Mixing",
    "Reader",
    "StreamedDataset",
    "View",
    "as_images",
    "augmentation",
    "epoch_order",
    "generator",
    "join",
    "load",
    "stream",
]  # fmt: skip

NAMES = ("digits", "digits-28", "fashion-mnist", "mnist", "cifar10")

Images = Dataset | StreamedDataset

_DEBIAN = Path("/usr/share/datasets")
_SPLITS = ("train", "test")
_FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class _Source:
    load: Callable[[list[Path], str], Dataset | None]
    how_to_get: str


def load(name: str, root: str | os.PathLike[str] | None = None, split: str = "train") -> Dataset:
    """Load one split of a data set into memory.

    Args:
        name: One of `NAMES`, or the path of a folder with `train/<class>/*.png` and `test/<class>/*.png`, whose images
            come in a random order that a fixed seed decides.
        root: The folder to search first, with its subfolder named after the data set. After that come the places
            where Debian's packages put the files.
        split: "train" or "test".

    Raises:
        DataError: The data set is missing (the message says how to get it), truncated or wrong.

    >>> from robustkern.data import load
    >>> load("digits").images.shape[1:]
    torch.Size([1, 8, 8])
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be train or test, got {split!r}")
    source = _SOURCES.get(name)
    if source is None:
        if Path(name).is_dir():
            return load_folder(Path(name), split)
        raise DataError(f"no data set {name!r}: it is neither one of {', '.join(NAMES)} nor an existing folder")
    folders = [_DEBIAN / name]
    if root is not None:
        if not Path(root).is_dir():
            raise DataError(f"--root {root}: no such folder")
        folders = [Path(root), Path(root) / name, *folders]
    data = source.load(folders, split)
    if data is None:
        raise DataError(f"{name} not found in {', '.join(str(folder) for folder in folders)}: {source.how_to_get}")
    return data


def stream(
    name: str,
    view: View,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    channels: int = 0,
    workers: int = 0,
) -> StreamedDataset:
    """One split of a data set that is read while it is used: images of any sizes, as many as there are.

    Args:
        name: The path of a folder, see `robustkern.data.stored.stream_folder`; or one of `NAMES`, which is in memory
            all the same, but cropped and scaled. The order is random, by a fixed seed.
        root: As for `load`.
        view: How they are cropped and scaled.
        split: "train" or "test".
        channels: 1 or 3; 0: 1 if the first 64 images are grey, else 3.
        workers: Processes that read and decode; 0: this one does. They change no bit.

    Raises:
        DataError: There is no such folder, or it is none of images in classes.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be train or test, got {split!r}")
    if name in _SOURCES or not Path(name).is_dir():
        return stream_dataset(load(name, root, split), view, channels, workers)
    return stream_folder(Path(name), split, view, channels, workers)


def join(first: Images, second: Images) -> Images:
    """The samples of both, the second one's after the first one's.

    Raises:
        DataError: They have other images or classes.
    """
    if (first.in_shape, first.classes) != (second.in_shape, second.classes):
        raise DataError(
            f"{second.name}: images {list(second.in_shape)} of {second.num_classes} classes beside those of "
            f"{first.name}, {list(first.in_shape)} of {first.num_classes}, or classes of other names"
        )
    if isinstance(first, StreamedDataset) and isinstance(second, StreamedDataset):
        return joined(first, second)
    if isinstance(first, Dataset) and isinstance(second, Dataset):
        both = torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels])
        return Dataset(first.name, *both, first.classes)
    raise DataError(f"{second.name}: one of both sets is in memory, the other is read while it is used")


def augmentation(name: str) -> CropFlip | None:
    """The augmentation a data set is trained with: crops and flips for natural images, none where they would hurt.

    >>> from robustkern.data import augmentation
    >>> augmentation("digits") is None, augmentation("cifar10")
    (True, CropFlip(padding=4, flip=True))
    """
    return CropFlip() if name == "cifar10" else None


def _digits(folders: list[Path], split: str) -> Dataset:
    """1797 grey images of 8x8 handwritten digits, shipped inside scikit-learn.

    The split is fixed: in each class, every fifth image, in the order of the file, is a test image. That makes 1442
    training and 355 test images.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits data set needs scikit-learn: {pip_install('sklearn')}") from error
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    number = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]  # of each image within its class, from 1
    is_test = number % 5 == 0
    return Dataset("digits", images, labels, _DIGITS).take(is_test if split == "test" else ~is_test)


def _enlarged_digits(folders: list[Path], split: str) -> Dataset | None:
    """The digits enlarged to 28x28 by bicubic interpolation.

    The images hold no more than before, but a network may now react to detail finer than any stroke. Its input
    gradients show whether it does; at 8x8 there is no room to see it.
    """
    small = _digits(folders, split)
    images = F.interpolate(small.images, size=(28, 28), mode="bicubic", align_corners=False).clamp_(0, 1)
    return Dataset("digits-28", images, small.labels, small.classes)


_SOURCES = {
    "digits": _Source(_digits, pip_install("sklearn")),
    "digits-28": _Source(_enlarged_digits, pip_install("sklearn")),
    "fashion-mnist": _Source(
        partial(load_idx, "fashion-mnist", _FASHION),
        "run `apt-get install dataset-fashion-mnist`, or put the four files of "
        "https://github.com/zalandoresearch/fashion-mnist into a folder and pass it as --root",
    ),
    "mnist": _Source(
        partial(load_idx, "mnist", _DIGITS),
        "put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
        "t10k-labels-idx1-ubyte.gz (https://yann.lecun.com/exdb/mnist/) into a folder and pass it as --root",
    ),
    "cifar10": _Source(
        load_cifar10,
        "run `wget https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz` and pass its folder as --root",
    ),
}
