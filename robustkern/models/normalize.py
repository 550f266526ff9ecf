"""Normalisation as the first layer of a model, so that every attack and every eps works on images in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std, per channel. Mean and standard deviation are buffers, saved with the weights.

    >>> from robustkern.models import Normalize
    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"Normalize: {len(mean)} means but {len(std)} standard deviations")
        if min(std) <= 0:
            raise ValueError(f"Normalize: standard deviations must be positive, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return (x - self.mean) / self.std
