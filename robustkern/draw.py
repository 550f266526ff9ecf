"""What is random or scheduled in one call of a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern._arguments import check_integer
from robustkern.sharding import Shard


@dataclass(frozen=True)
class Draw:
    """Where one call of a loss takes its random numbers from, which step it is, and which rows of the batch it sees.

    A loss remembers nothing: whatever differs between two calls on the same batch stands here or in PyTorch's default
    generators, and a training that gives each step the draw of its number ends, resumed, in the same bits.

    Attributes:
        generator: Of the loss's own random numbers, on the device of x; the call moves it on.  None: PyTorch's default
            one, which it has to be in a step that torch.compile traces.
        step: Number of the step, from 0.  `robustkern.losses.Lazy` goes by it, and refuses None.
        shard: Rows of a larger batch that x and y are; None: all of them.
    """

    generator: torch.Generator | None = None
    step: int | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if self.step is not None:
            check_integer("Draw", "step", self.step, 0)

    def samples(self, x: Tensor) -> Tensor | None:
        """Numbers of the rows of x in the whole batch, [B] int64; None: 0, 1, 2, ..."""
        return None if self.shard is None else self.shard.samples(x.device)

    def normal(self, x: Tensor) -> Tensor:
        """Normally distributed, in float32, [B, ...]; a sample's numbers do not depend on which process has it."""
        rows = len(x) if self.shard is None else self.shard.total
        noise = torch.randn(rows, *x.shape[1:], generator=self.generator, device=x.device)
        return noise if self.shard is None else self.shard.rows(noise)


FRESH = Draw()  # what a call without one has
