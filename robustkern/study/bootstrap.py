"""Confidence intervals for means of anything, by resampling."""

from __future__ import annotations

import torch
from torch import Tensor


def bootstrap_interval(
    values: Tensor, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Quantiles of the means of resamples, drawn with replacement: where the mean of the population lies.

    The percentile bootstrap.  Rows are resampled whole: for [N, S] with N images and S seeds, an image comes with what
    every seed gave for it.
    Source: Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 1979.

    Args:
        values: One number for each image, [N], or rows of them, [N, S].
        confidence: Share of such intervals that hold the true mean, in (0, 1).
        resamples: Number of resamples.
        seed: Decides them.

    Raises:
        ValueError: No values, values that are not finite, or a confidence out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval: confidence must be in (0, 1), got {confidence}")
    if not len(values) or not bool(values.isfinite().all()):
        raise ValueError("bootstrap_interval: values must be finite, and at least one")
    means = values.detach().double().cpu().reshape(len(values), -1).mean(1)
    generator = torch.Generator().manual_seed(seed)
    count = len(means)
    # In blocks: resamples times N indices would not fit for large sets.
    drawn = [
        means[torch.randint(count, (block, count), generator=generator)].mean(1)
        for block in [max(1, min(resamples, 2**24 // count))] * -(-resamples // max(1, min(resamples, 2**24 // count)))
    ]
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(drawn)[:resamples], tails).tolist()
    return low, high
