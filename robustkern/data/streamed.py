"""A data set that is read while it is used: nothing decoded is kept, and every random choice is a function of
(seed, epoch, sample), whoever makes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, Dataset
from .decode import View, decode, upright_size
from .folder import is_grey, stored_as
from .randomness import generator

_LOOKED_AT = 64  # images that decide whether a data set is grey
_MEASURED = 256  # images that mean and deviation are of


class Source(Protocol):
    """Where images come from, by number."""

    def __len__(self) -> int: ...

    def opened(self, number: int) -> Any:
        """A context with the image, opened by Pillow."""

    def name(self, number: int) -> Any:
        """What messages call it."""


@dataclass(frozen=True)
class StreamedDataset:
    """One split of a data set, read while it is used. It is what `Dataset` is, but for `images`.

    Attributes:
        name: The name it was loaded by.
        source: The images.
        rows: Which of them, in which order.  [N] int64
        labels: int64 class indices.  [N]
        classes: Class names, in the order of the labels.
        channels: 1 or 3.
        view: How they are cropped and scaled.
        workers: Processes that read and decode; 0: none but this one. They change no bit.
    """

    name: str
    source: Source
    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    channels: int
    view: View
    workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.view.size, self.view.size

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of the first 256 images."""
        return self.first(_MEASURED).in_memory().statistics()

    def with_shuffled_labels(self, seed: int) -> StreamedDataset:
        """The same images with the labels shuffled among them, so that labels say nothing about images."""
        order = torch.randperm(len(self), generator=generator(seed, "labels"))
        return replace(self, labels=self.labels[order])

    def take(self, indices: Tensor | slice) -> StreamedDataset:
        """Some of the samples."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def first(self, count: int | None) -> StreamedDataset:
        """The first `count` samples, or all of them for None."""
        return self if count is None or count >= len(self) else self.take(slice(count))

    def in_memory(self) -> Dataset:
        """All images, as they are evaluated."""
        images = torch.empty(len(self), *self.in_shape)
        done = 0
        for x, _ in self.parts(torch.arange(len(self)).split(64)):
            images[done : done + len(x)] = x
            done += len(x)
        return Dataset(self.name, images, self.labels, self.classes)

    def parts(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as they are evaluated, float32 in [0, 1], and labels, for each of these lists of samples."""
        with Reader(self) as reader:
            for part, pixels in zip(parts, reader.read(parts), strict=True):
                yield as_images(pixels), self.labels[part]


def streamed(name: str, source: Source, labels: Tensor, classes: tuple[str, ...], view: View, channels: int,
             workers: int) -> StreamedDataset:  # fmt: skip
    """A data set of all images of a source, in an order that a fixed seed decides.

    Args:
        name: Its name.
        source: The images.
        labels: Of the source.
        classes: Their names.
        view: How the images are cropped and scaled.
        channels: 1 or 3; 0: 1 if the first images are grey, else 3.
        workers: Processes that read and decode.
    """
    order = torch.randperm(len(source), generator=generator(0, "folder"))
    if not channels:
        grey = []
        for number in order[:_LOOKED_AT].tolist():
            with source.opened(number) as image:
                grey.append(is_grey(image, stored_as(image)))
        channels = 1 if all(grey) else 3
    return StreamedDataset(name, source, order, labels[order], classes, channels, view, workers)


def as_images(pixels: Tensor, device: str = "cpu") -> Tensor:
    """Bytes as float32 in [0, 1] on a device; the bytes travel, a quarter of the numbers' size.

    >>> from robustkern.data import as_images
    >>> as_images(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
    1.0
    """
    return pixels.to(device, non_blocking=True).float().div_(255)


@dataclass(frozen=True)
class JoinedSource:
    """Two sources, the second one's images after the first one's."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def _place(self, number: int) -> tuple[Source, int]:
        beyond = number - len(self.first)
        return (self.first, number) if beyond < 0 else (self.second, beyond)

    def opened(self, number: int) -> Any:
        source, place = self._place(number)
        return source.opened(place)

    def name(self, number: int) -> Any:
        source, place = self._place(number)
        return source.name(place)


def joined(first: StreamedDataset, second: StreamedDataset) -> StreamedDataset:
    """The samples of both, the second one's after the first one's, which decides everything else."""
    rows = torch.cat([first.rows, second.rows + len(first.source)])
    labels = torch.cat([first.labels, second.labels])
    return replace(first, source=JoinedSource(first.source, second.source), rows=rows, labels=labels)


class Reader:
    """Reads lists of samples, by processes that live as long as it does and read ahead.

    Args:
        data: What is read.
        seed: Seed of the random crops; None: images as they are evaluated.
        pin: Whether the bytes shall be in pinned memory, from which copies to a GPU do not wait.
    """

    def __init__(self, data: StreamedDataset, seed: int | None = None, pin: bool = False) -> None:
        from torch.utils.data import DataLoader

        self._plan = _Plan()
        # A list of samples ahead for each process: bytes, in memory that they share.
        ahead: dict[str, Any] = {"prefetch_factor": 2, "persistent_workers": True} if data.workers else {}
        self._loader: Any = DataLoader(
            _Samples(data, seed), batch_sampler=self._plan, num_workers=data.workers, collate_fn=_collated,
            pin_memory=pin, worker_init_fn=_begin_worker, generator=torch.Generator(), **ahead,
        )  # fmt: skip

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loader = None  # ends its processes

    def read(self, parts: Sequence[Tensor], epoch: int = 0) -> Iterator[Tensor]:
        """Bytes [B, C, H, W] of each list of samples, in their order.

        Raises:
            DataError: An image cannot be read, or one of the processes ended.
        """
        self._plan.set(parts, epoch)
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:  # such as one that the system ended for its memory
                reason = str(error).strip().partition("\n")[0]
                raise DataError(f"a process that reads images ended: {reason}") from error
            if batch is None:
                return
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


class _Plan:
    """What the loader asks for its next lists: pairs (epoch, sample)."""

    def __init__(self) -> None:
        self._parts: Sequence[Tensor] = ()
        self._epoch = 0

    def set(self, parts: Sequence[Tensor], epoch: int) -> None:
        self._parts, self._epoch = parts, epoch

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self._parts:
            yield [(self._epoch, sample) for sample in part.tolist()]


class _Samples(torch.utils.data.Dataset[Any]):
    """What the loader's processes have."""

    def __init__(self, data: StreamedDataset, seed: int | None) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray | str:
        epoch, sample = key
        data, view = self.data, self.data.view
        number = int(data.rows[sample])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about odd files that it can read all the same
                with data.source.opened(number) as image:
                    box, mirrored = view.middle(*upright_size(image)), False
                    if self.seed is not None:
                        # By the number in the source: the same image has the same crops in every part of the data.
                        box, mirrored = view.draw(*upright_size(image), self.seed, epoch, number)
                    return decode(image, data.source.name(number), data.channels, view.size, box, mirrored)
        except DataError as error:
            return str(error)  # an exception would arrive with the traceback of its process


def _collated(images: list[np.ndarray | str]) -> Tensor | str:
    found = [image for image in images if isinstance(image, np.ndarray)]
    if len(found) < len(images):
        return next(image for image in images if isinstance(image, str))
    return torch.from_numpy(np.stack(found))


def _begin_worker(number: int) -> None:
    """The process that trains decides what a signal to all of them means."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
