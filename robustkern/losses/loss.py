"""What every loss is: a frozen dataclass of options, called with a model, a batch and a draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustkern._classifier import check_call
from robustkern._options import check_options
from robustkern.draw import FRESH, Draw
from robustkern.terms import Terms

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """total = orientation + weight * smoothness, each the mean over the batch of a per-sample quantity."""

    soft: ClassVar[bool] = True  # whether y may be probabilities

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, model: Model, x: Tensor, y: Tensor, draw: Draw | None = None) -> Terms:
        """Both terms for a batch.

        Args:
            model: Maps x to logits [B, C >= 2], normalisation inside; any callable, but an nn.Module for `AWP`.
            x: Images, in [0, 1] where adversaries are looked for.  One that requires grad is used as it is, which is
                what torch.compile of a whole step needs, any other as a new leaf; `Terms.backward(inputs=...)` spares
                its own gradient.  [B, ...]
            y: Classes of any integer dtype [B]; for losses without an attack inside also probabilities [B, C].
            draw: What is random or scheduled in this call; None: random numbers from PyTorch's default generator, the
                whole batch, and no step.

        Raises:
            TypeError: An argument of another type or dtype.
            ValueError: A shape, device or number that makes no sense, or a model that does not depend on x.
        """
        name, draw = type(self).__name__, FRESH if draw is None else draw
        if not isinstance(draw, Draw):
            raise TypeError(f"{name}: draw must be a robustkern.Draw or None, got {type(draw).__name__}")
        y = check_call(name, model, x, y, draw.generator, soft=self.soft)
        if draw.shard is not None and draw.shard.size != len(x):
            raise ValueError(f"{name}: shard has {draw.shard.size} rows, x has {len(x)}")
        return self._terms(model, x, y, draw)

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        raise NotImplementedError
