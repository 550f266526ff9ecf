"""Confidence intervals for accuracies."""

import math
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""(k + z^2/2 -+ z sqrt(k (n - k) / n + z^2/4)) / (n + z^2): where a probability lies, given k of n.

    Stays inside [0, 1] and is right on average even near 0 and 1, where k/n -+ z sqrt(k (n - k) / n^3) is not.
    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.

    Args:
        successes: k, between 0 and trials.
        trials: n.
        confidence: Share of such intervals that hold the true probability, in (0, 1).

    Returns:
        Both ends; (0, 1) without any trial.

    Raises:
        ValueError: The arguments are out of range.

    >>> from robustkern.evaluation import wilson_interval
    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"wilson_interval: successes must be between 0 and trials, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"wilson_interval: confidence must be in (0, 1), got {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = successes + z * z / 2
    half = z * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    low, high = (centre - half) / (trials + z * z), (centre + half) / (trials + z * z)
    # Exactly 0 and 1 at the ends, where the terms cancel up to rounding.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)
