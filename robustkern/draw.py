"""What is random or scheduled in one call of a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern._arguments import check_integer
from robustkern.sharding import Shard


@dataclass(frozen=True)
class Draw:
    """Where one call of a loss gets its random numbers, which step it belongs to, and which rows of the batch it sees.

    A loss keeps no state: only this and PyTorch's default generators can make two calls on the same batch differ.  If a
    step's draw depends only on the step's number, resumed training ends in the same bits.

    Attributes:
        generator: Source of the loss's own random numbers, on the device of x; the call advances it.  None: PyTorch's
            default one, the only one that torch.compile can trace.
        step: Number of the step, from 0.  `robustkern.losses.Lazy` depends on it and refuses None.
        shard: Which rows of a larger batch x and y are; None: all of them.

    >>> attack_loss = rk.losses.TRADES(steps=1)
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> draws = [rk.Draw(torch.Generator().manual_seed(0)) for _ in range(2)]
    >>> once, again = (attack_loss(model, x, y, draw).total.item() for draw in draws)
    >>> once == again
    True
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
        """Normal random numbers, float32 [B, ...]; a sample's numbers do not depend on which process has it."""
        rows = len(x) if self.shard is None else self.shard.total
        noise = torch.randn(rows, *x.shape[1:], generator=self.generator, device=x.device)
        return noise if self.shard is None else self.shard.rows(noise)


FRESH = Draw()  # the draw of a call that gives none
