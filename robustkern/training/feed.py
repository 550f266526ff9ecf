"""The batches of a run: read, brought to the device, augmented; each a function of the configuration and its step."""

from collections.abc import Iterator

from torch import Tensor

from robustkern import data as datasets
from robustkern.data import BatchAugmentation, Dataset, Images, Mixing, Reader, StreamedDataset, as_images
from robustkern.sharding import Shard

from .batches import epoch_batches
from .config import TrainingConfig


class Feed:
    """The batches of a run.

    Args:
        config: Of the run.
        data: What is trained on, the extra samples behind the others.
        extra: How many of them are extra.
    """

    def __init__(self, config: TrainingConfig, data: Images, extra: int = 0) -> None:
        self.config, self.data, self.extra = config, data, extra
        self._crops = datasets.augmentation(config.data) if isinstance(data, Dataset) else None
        self._augmentation = BatchAugmentation(config.randaugment, config.magnitude, config.colour, config.erasing)
        self._mixing = Mixing(config.mixup, config.cutmix)
        self._reader: Reader | None = None
        self._read: Iterator[Tensor] = iter(())

    def epoch(self, epoch: int, rank: int, size: int, first: int = 0) -> list[Tensor]:
        """The samples of the batches of an epoch, of all processes together; `batch` must follow their order.

        Args:
            epoch: From 0.
            rank: Number of this process.
            size: Number of processes.
            first: The first batch that will be asked for.
        """
        whole = epoch_batches(self.config, len(self.data) - self.extra, self.extra, epoch)
        if isinstance(self.data, StreamedDataset):
            if self._reader is None:
                self._reader = Reader(self.data, self.config.seed, pin=self.config.device == "cuda")
            mine = [part[self._rows(Shard.of(rank, size, len(part)))] for part in whole[first:]]
            self._read = self._reader.read(mine, epoch)
        return whole

    def close(self) -> None:
        """Ends the processes that read."""
        self._read, self._reader = iter(()), None

    def batch(self, indices: Tensor, shard: Shard, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels, or with mixing their probabilities, of these rows of a batch, on the device.

        Args:
            indices: The samples of the whole batch.
            shard: Which rows.
            epoch: From 0.
            step: Number of the step in the run.
        """
        config, rows = self.config, self._rows(shard)
        mine = indices[rows]
        x, y = self._images(mine, epoch), _moved(self.data.labels[mine], config.device)
        if self._augmentation:
            x = self._augmentation(x, mine, seed=config.seed, epoch=epoch)
        if not self._mixing:
            return x, y
        x, y = self._mixing(x, y, self.data.num_classes, offset=rows.start, seed=config.seed, step=step)
        own = slice(shard.offset - rows.start, shard.offset - rows.start + shard.size)
        return x[own], y[own]

    def _rows(self, shard: Shard) -> slice:
        """The rows of the whole batch that this process needs: its own, and those that they are mixed with."""
        if not self._mixing:
            return slice(shard.offset, shard.offset + shard.size)
        return slice(*Mixing.with_partners(shard.offset, shard.size, shard.total))

    def _images(self, samples: Tensor, epoch: int) -> Tensor:
        config = self.config
        if isinstance(self.data, StreamedDataset):
            return as_images(next(self._read), config.device)
        x = self.data.images[samples]
        if self._crops is not None:
            x = self._crops(x, samples, seed=config.seed, epoch=epoch, count=len(self.data))
        return _moved(x, config.device)


def _moved(tensor: Tensor, device: str) -> Tensor:
    # From ordinary memory a copy to the device waits for it.
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
