"""The batches of an epoch, and whether a model can be trained on them."""

import torch
from torch import Tensor

from robustkern import models
from robustkern.data import Images, epoch_order, generator

from .config import TrainingConfig
from .errors import UsageError


def batches(count: int, size: int) -> list[tuple[int, int]]:
    """Begin and end of the batches of an epoch; a single sample at the end joins the batch before.

    A batch of one has no statistics for BatchNorm, and its gradient is noise.
    """
    begins = list(range(0, count, size))
    if size > 1 and len(begins) > 1 and begins[-1] == count - 1:
        begins.pop()
    return list(zip(begins, [*begins[1:], count], strict=True))


def main_size(config: TrainingConfig) -> int:
    """How many samples of a batch are not extra."""
    return config.batch_size - round(config.extra_share * config.batch_size) if config.extra else config.batch_size


def epoch_batches(config: TrainingConfig, count: int, extra: int, epoch: int) -> list[Tensor]:
    """The samples of each batch of an epoch, a function of the seed and the epoch.

    The epoch visits each of the `count` samples once. Extra samples, numbered from `count` on, fill each batch up to
    its share; they go round in random orders of their own, from one epoch to the next.
    """
    order, main = epoch_order(config.seed, epoch, count), main_size(config)
    whole = [order[begin:end] for begin, end in batches(count, main)]
    if not extra:
        return whole
    # As many for each of the others as in a full batch.
    sizes = [round(len(part) * (config.batch_size - main) / main) for part in whole]
    position = epoch * sum(sizes)
    turn, place = divmod(position, extra)
    more, parts = _extra_order(config, turn, extra), []
    for size in sizes:
        pieces = []
        while size:
            piece = more[place : place + size]
            pieces.append(piece)
            size, place = size - len(piece), place + len(piece)
            if place == extra:
                turn, place = turn + 1, 0
                more = _extra_order(config, turn, extra)
        parts.append(torch.cat([torch.empty(0, dtype=torch.int64), *pieces]) + count)
    return [torch.cat(pair) for pair in zip(whole, parts, strict=True)]


def _extra_order(config: TrainingConfig, turn: int, extra: int) -> Tensor:
    return torch.randperm(extra, generator=generator(config.seed, "extra", turn))


def check_batches(config: TrainingConfig, train_set: Images, processes: int) -> None:
    """Raises UsageError if a batch, or a process's part of it, is too small for the model to be trained on."""
    count = processes * config.accumulate
    parts = [max(1, (end - begin) // count) for begin, end in batches(len(train_set), config.batch_size)]
    if min(parts) > 1 or (processes > 1 and config.sync_batch_norm):
        return
    shape = train_set.in_shape
    # Shapes alone, where the network is known to be content with them.
    device = torch.device("meta" if config.model in models.MODELS else "cpu")
    with torch.random.fork_rng(devices=[]), device:
        model = models.create(config.model, train_set.num_classes, shape, options=config.model_options)
        try:
            model.train()(torch.zeros(1, *shape))
        except ValueError as error:
            raise UsageError(
                f"model {config.model} cannot be trained on {list(shape)} images one at a time ({len(train_set)} "
                f"samples, batch_size {config.batch_size}, accumulate {config.accumulate}, processes {processes}): "
                f"{str(error).split(', got')[0]}"
            ) from error
