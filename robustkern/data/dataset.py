"""A data set: one split, all of it in memory, as float32 images in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .randomness import generator


class DataError(RuntimeError):
    """A data set is missing, truncated or not what it should be; the message is one sentence for the user."""


class DataWarning(UserWarning):
    """A data set was loaded, but not every file in its folder; the message is one sentence for the user."""


@dataclass(frozen=True)
class Dataset:
    """One split of a data set, in memory.

    Attributes:
        name: The name it was loaded by.
        images: float32 in [0, 1].  [N, C, H, W]
        labels: int64 class indices.  [N]
        classes: Class names, in the order of the labels.

    >>> from robustkern.data import Dataset
    >>> data = Dataset("mine", torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]), ("no", "yes"))
    >>> len(data.images), data.classes
    (4, ('no', 'yes'))
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype != torch.float32:
            raise DataError(
                f"{self.name}: images must be float32 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}"
            )
        if not all(self.images.shape[1:]):
            raise DataError(f"{self.name}: images of {list(self.images.shape[1:])} have no pixels")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(f"{self.name}: labels outside 0..{len(self.classes) - 1}")

    @classmethod
    def from_bytes(cls, name: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Dataset:
        """A data set from bytes; a byte v means v / 255.

        Args:
            name: Its name.
            pixels: [N, C, H, W] uint8
            labels: [N] uint8
            classes: Names of the classes.
        """
        images = torch.from_numpy(pixels.astype(np.float32, order="C") / np.float32(255))
        return cls(name, images, torch.from_numpy(labels.astype(np.int64)), classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel: what a model normalises its inputs with."""
        channels = self.images.movedim(1, 0).flatten(1).double()
        std, mean = torch.std_mean(channels, dim=1, correction=0)
        return tuple(mean.tolist()), tuple(std.clamp_min(1e-3).tolist())

    def in_memory(self) -> Dataset:
        """Itself."""
        return self

    def parts(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels for each of these lists of samples."""
        for part in parts:
            yield self.images[part], self.labels[part]

    def with_shuffled_labels(self, seed: int) -> Dataset:
        """The same images with the labels shuffled among them, so that labels say nothing about images."""
        order = torch.randperm(len(self), generator=generator(seed, "labels"))
        return replace(self, labels=self.labels[order])

    def take(self, indices: Tensor | slice) -> Dataset:
        """Some of the samples."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def first(self, count: int | None) -> Dataset:
        """The first `count` samples, or all of them for None."""
        return self if count is None or count >= len(self) else self.take(slice(count))
