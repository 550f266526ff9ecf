"""Which weights of a run are the best ones, and whether it has collapsed: by held-out images, never by test images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robustkern.data import DataError, Dataset, generator

from .checkpoint import Row

_DROP = 0.2  # of robust accuracy between two evaluations
_GAP = 0.3  # between the accuracies under a single-step and a multi-step attack of the same radius


def split(data: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """The samples to train on, in their order, and those held out, in random order; a function of the seed.

    Args:
        data: The training set.
        validation: Share of it to hold out, below 1, or how many samples. 0: none.
        seed: Decides which ones.

    Raises:
        DataError: Nothing would be left on one side.
    """
    if not validation:
        return data, None
    count = round(validation * len(data)) if validation < 1 else int(validation)
    if not 1 <= count < len(data):
        raise DataError(
            f"{data.name}: cannot hold out {count} of {len(data)} training samples for validation: "
            "some must be left on either side"
        )
    order = torch.randperm(len(data), generator=generator(seed, "validation"))
    held_out, kept = order[:count], order[count:].sort().values
    return _subset(data, kept), _subset(data, held_out)


def _subset(data: Dataset, indices: torch.Tensor) -> Dataset:
    return Dataset(data.name, data.images[indices], data.labels[indices], data.classes)


def overfitting(robust: float, fgsm: float | None, rows: Sequence[Row], key: str) -> str | None:
    """What looks like catastrophic overfitting, as a phrase; None if nothing does.

    Training on single-step attacks can collapse within one epoch: the network then resists them and nothing else.
    Two signs, either is enough: accuracy under PGD fell by more than 20 points since it was last measured; accuracy
    under FGSM is more than 30 points above that under PGD.

    Args:
        robust: Accuracy under PGD now.
        fgsm: Accuracy under FGSM now, if it was measured.
        rows: The epochs before.
        key: What accuracy under PGD is called in them.
    """
    before = next((value for row in reversed(rows) if (value := row.get(key)) is not None), None)
    if before is not None and before - robust > _DROP:
        return f"PGD accuracy fell from {before:.1%} to {robust:.1%}"
    if fgsm is not None and fgsm - robust > _GAP:
        return f"FGSM accuracy is {fgsm:.1%}, PGD accuracy {robust:.1%}"
    return None
