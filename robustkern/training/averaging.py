"""Averages of the weights over training: smoother than the last ones, and less prone to robust overfitting."""

import copy

import torch
from torch import nn


class WeightAverage:
    """average <- d average + (1 - d) weights after each step, d = min(decay, (1 + t) / (10 + t)) at update t.

    Without the warm-up of d the initial weights would count for 1 / (1 - decay) steps.  Buffers, such as BatchNorm's
    statistics, which are averages already, are copied.  The average is held in the dtype of the weights.
    Source: Gowal et al., Uncovering the limits of adversarial training against norm-bounded adversarial examples,
    2020.

    Args:
        model: The model whose weights are averaged; the average starts from their present values.
        decay: In [0, 1).

    Attributes:
        model: The averaged model, in eval mode.
        updates: How many steps went into the average.

    >>> from robustkern.training import WeightAverage
    >>> model = nn.Linear(2, 1)
    >>> average = WeightAverage(model, 0.9)
    >>> model.weight.data += 1
    >>> average.update(model)
    >>> average.updates
    1
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAverage: decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
        for mine, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)
        self.updates += 1
