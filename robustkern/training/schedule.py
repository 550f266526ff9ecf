"""Learning rate and smoothness weight as functions of the step, so that a schedule has no state to save."""

import math
from collections.abc import Sequence

_WARM_UP = 0.25  # share of the steps in which the one-cycle schedule rises
_MILESTONES = (0.5, 0.75)  # shares of the steps after which the step schedule falls by default


def learning_rate(
    schedule: str,
    peak: float,
    step: int,
    steps: int,
    *,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    warm_up: float = 0.0,
    least: float = 0.0,
) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    Args:
        schedule: "one-cycle", "cosine", "triangular", "step" or "constant".
        peak: The highest learning rate.
        step: Steps already taken.
        steps: Steps of the whole run.
        milestones: For "step", the shares of the steps after which it falls; by default half and three quarters.
        gamma: The factor at each of them.
        warm_up: Share of the steps in which the rate rises linearly to its peak; a cosine begins after them.
        least: What the rate falls to.
    """
    rise = round(warm_up * steps)
    if step < rise:
        return peak * (step + 1) / rise
    shift = rise if schedule == "cosine" else 0
    rate = _falling(schedule, peak, step - shift, steps - shift, milestones, gamma)
    return least + rate * (1 - least / peak) if least else rate


def _falling(schedule: str, peak: float, step: int, steps: int, milestones: Sequence[float], gamma: float) -> float:
    """The rate between its peak and zero."""
    if schedule == "constant":
        return peak
    if schedule == "step":
        # In whole steps: k / n * n is not always k in floating point.
        return peak * gamma ** sum(step >= round(share * steps) for share in milestones or _MILESTONES)
    if schedule == "triangular":
        # The corners lie at -1, the middle and `steps`: no step of a run has a rate of zero.
        half = (steps + 1) / 2
        return peak * (1 - abs(step + 1 - half) / half)
    rise = _WARM_UP * steps if schedule == "one-cycle" else 0.0
    if step + 1 <= rise:
        return peak * (step + 1) / rise
    # Over the remaining steps, never quite zero: the last step is a step too.
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) if step > rise else peak


def weight_factor(ramp: float, step: int, steps: int) -> float:
    """The share of the smoothness weight that step `step` uses: a linear ramp over the first `ramp` of the steps.

    With the full weight from the first step, a constant classifier, which is perfectly smooth, is the nearest minimum.
    """
    return min(1.0, (step + 1) / (ramp * steps)) if ramp > 0 else 1.0
