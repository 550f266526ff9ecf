"""What a loss around another hands on to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.sharding import Shard
from robustkern.terms import Terms

Loss = Callable[[nn.Module, Tensor, Tensor], Terms]


class Wrapper:
    """`generator` and `shard` are those of the loss inside, as far as it has them."""

    loss: Loss

    @property
    def generator(self) -> Any:
        return self.loss.generator  # type: ignore[attr-defined]

    @generator.setter
    def generator(self, value: torch.Generator | None) -> None:
        self.loss.generator = value  # type: ignore[attr-defined]

    @property
    def shard(self) -> Shard | None:
        return self.loss.shard  # type: ignore[attr-defined]

    @shard.setter
    def shard(self, value: Shard | None) -> None:
        self.loss.shard = value  # type: ignore[attr-defined]
