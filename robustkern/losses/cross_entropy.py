"""Standard training: orientation without smoothness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustkern._classifier import check_call, logits_of
from robustkern._options import check_options
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.terms import Terms


@dataclass(frozen=True)
class CrossEntropy:
    """total = mean_i CE(f(x_i), y_i).

    orientation: the mean cross-entropy.  smoothness: none (0, with weight 0).

    Args:
        label_smoothing: share of the target spread evenly over the classes, in [0, 1].
        temperature: divides the logits.
        impl: "auto", "kernel" or "reference".

    The call takes a model that maps x [B, ...] to logits [B, C], and classes or probabilities y; see
    `robustkern.ops.softmax_cross_entropy` for dtypes, errors and derivatives.
    """

    label_smoothing: float = 0.0
    temperature: float = 1.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Terms:
        y = check_call("CrossEntropy", model, x, y, soft=True)
        logits = logits_of("CrossEntropy", model, x, y)
        loss = softmax_cross_entropy(
            logits, y, label_smoothing=self.label_smoothing, temperature=self.temperature, impl=self.impl
        )
        orientation = loss.mean()
        return Terms(orientation, orientation.new_zeros(()), 0.0)
