"""What a study's numbers say: means, curves, the differences that the claim is about, rank correlations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bootstrap import bootstrap_interval
from .measures import MEASURES, centre, summarise

# name: (cell of the 2x2, cell that is subtracted); a cell is (oriented, smooth)
CONTRASTS: dict[str, tuple[tuple[bool, bool], tuple[bool, bool]]] = {
    "both − orientation alone": ((True, True), (True, False)),
    "both − smoothness alone": ((True, True), (False, True)),
    "orientation alone − neither": ((True, False), (False, False)),
    "smoothness alone − neither": ((False, True), (False, False)),
}
# Measures that are small where a network is smooth: of the loss, as a mean and as a median, and of the logits.
SMOOTHNESS = ("gradient_norm", "median_gradient_norm", "local_lipschitz")
Values = Mapping[str, Tensor]  # for one model: a number for each image, by measure


def summary(models: Sequence[Values]) -> dict[str, dict[str, Any]]:
    """Mean or median, and interval, of each measure over images and seeds, and the mean or median of each seed.

    Args:
        models: The values of each seed.
    """
    return _over_seeds({name: [model[name] for model in models] for name in MEASURES})


def curve(standing: Sequence[Tensor], radii: Sequence[float]) -> list[dict[str, float]]:
    """Points of eps, accuracy, low, high.

    Args:
        standing: For each seed, which image withstands which radius.  [N, len(radii)]
        radii: Ascending.
    """
    points = []
    for eps, stands in zip(radii, torch.stack(list(standing), 2).unbind(1), strict=True):
        low, high = bootstrap_interval(stands)
        points.append({"eps": eps, "accuracy": float(stands.mean()), "low": low, "high": high})
    return points


def contrasts(cells: Mapping[tuple[bool, bool], Sequence[Values]]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each of `CONTRASTS` and each measure: mean (or median) difference, low, high, and that of each seed.

    Paired: an image's value under one network less its value under the other, of the same seed; the bootstrap draws
    images.  An interval without zero says that these networks differ on images like these; the values of the
    seeds show how much networks of other seeds would differ.

    Args:
        cells: By (oriented, smooth), the values of each seed.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for label, (one, other) in CONTRASTS.items():
        seeds = list(zip(cells[one], cells[other], strict=True))
        found[label] = _over_seeds({name: [a[name] - b[name] for a, b in seeds] for name in MEASURES}, differences=True)
    return found


def rank_correlations(networks: Sequence[Mapping[str, Mapping[str, Any]]], smoothness: str) -> dict[str, float]:
    """Spearman's rank correlation, over networks, of each measure with smoothness: smoother is less of `smoothness`.

    Smoothness can be measured in several ways, and the answer depends on it: ask for more than one.

    Args:
        networks: Their summaries, three or more.
        smoothness: The measure that is small where a network is smooth.
    """
    if len(networks) < 3:
        return {}
    found = {}
    for name in MEASURES:
        pairs = [(n[smoothness]["value"], n[name]["value"]) for n in networks]
        known = torch.tensor([pair for pair in pairs if None not in pair], dtype=torch.float64)
        if name not in SMOOTHNESS and len(known) >= 3:
            ranks = torch.stack([_ranks(-known[:, 0]), _ranks(known[:, 1])])
            # Undefined where all values are the same.
            found[name] = float(torch.corrcoef(ranks).nan_to_num()[0, 1])
    return found


def _ranks(values: Tensor) -> Tensor:
    """1 for the smallest; equal values share the mean of their ranks."""
    below, same = values[:, None] > values[None, :], values[:, None] == values[None, :]
    return below.double().sum(1) + (same.double().sum(1) + 1) / 2


def _over_seeds(values: Mapping[str, Sequence[Tensor]], *, differences: bool = False) -> dict[str, dict[str, Any]]:
    """The summary of each measure's values, given for each seed, with the centre of each seed."""
    found = summarise({name: torch.stack(list(seeds), 1) for name, seeds in values.items()}, differences=differences)
    for name, seeds in values.items():
        finite = [of_one[of_one.isfinite()] for of_one in seeds]
        found[name]["seeds"] = [centre(name, of_one) if len(of_one) else None for of_one in finite]
    return found
