"""Confidence intervals for means of anything, by resampling."""

import torch
from torch import Tensor

from robustkern._choices import STATISTICS, Statistic


def bootstrap_interval(
    values: Tensor, *, statistic: Statistic = "mean", confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Quantiles of the means of resamples, drawn with replacement: where the mean of the population lies.

    The percentile bootstrap.  Rows are resampled whole: for [N, S] with N images and S seeds, an image comes with its
    values for all seeds.  For N rows with the same mean it says nothing: the interval is that number.
    Source: Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 1979.

    Args:
        values: One number for each image, [N], or more of them, [N, ...].
        statistic: "mean" or "median", of all numbers of a resample.
        confidence: Share of such intervals that hold the true mean, in (0, 1).
        resamples: Number of resamples.
        seed: Decides them.

    Raises:
        ValueError: No values, values that are not finite, or a confidence out of range.

    >>> from robustkern.study import bootstrap_interval
    >>> low, high = bootstrap_interval(torch.arange(100.0))
    >>> low < 49.5 < high
    True
    """
    if statistic not in STATISTICS:
        raise ValueError(f"bootstrap_interval: statistic must be 'mean' or 'median', got {statistic!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval: confidence must be in (0, 1), got {confidence}")
    if not len(values) or not bool(values.isfinite().all()):
        raise ValueError("bootstrap_interval: values must be finite, and at least one")
    rows = values.detach().double().cpu().reshape(len(values), -1)
    rows = rows.mean(1, keepdim=True) if statistic == "mean" else rows
    generator = torch.Generator().manual_seed(seed)
    # In blocks: resamples times N indices would not fit for large sets.
    block = max(1, min(resamples, 2**24 // rows.numel()))
    drawn = []
    for _ in range(-(-resamples // block)):
        numbers = rows[torch.randint(len(rows), (block, len(rows)), generator=generator)].flatten(1)
        drawn.append(numbers.mean(1) if statistic == "mean" else numbers.quantile(0.5, dim=1))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(drawn)[:resamples], tails).tolist()
    return low, high
