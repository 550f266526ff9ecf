"""What every loss is: a frozen dataclass of options, called with a model, a batch and a draw."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import Impl
from robustkern._classifier import check_call, logits_of, warn_outside
from robustkern._input_gradient import check_differentiable, input_gradient
from robustkern._options import check_options
from robustkern.draw import FRESH, Draw
from robustkern.terms import Terms

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """total = orientation + weight * smoothness, each the mean over the batch of a per-sample quantity."""

    soft: ClassVar[bool] = True  # whether y may be probabilities
    label_smoothing, temperature, impl = 0.0, 1.0, cast(Impl, "auto")  # for losses without these options

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, model: Model, x: Tensor, y: Tensor, draw: Draw | None = None) -> Terms:
        """Both terms for a batch.

        Args:
            model: Maps x to logits [B, C >= 2], normalisation inside; any callable, but an nn.Module for `AWP`.
            x: Images; in [0, 1] for losses with an attack inside, and for an `eps` that means what it means in
                publications: a loss with an `eps` warns once, on the CPU, of others.  If it requires grad, it is used
                as it is, which torch.compile of a whole step needs; if not, as a new leaf.
                `Terms.backward(inputs=...)` saves the time for its own gradient.  [B, ...]
            y: Classes of any integer dtype [B], or probabilities [B, C], such as those of mixed images; for `MART`, and
                with an attack on another loss than the cross-entropy, classes.
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
        if hasattr(self, "eps"):
            warn_outside(name, x)
        return self._terms(model, x, y, draw)

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        raise NotImplementedError

    def _cross_entropy(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """CE(f(x_i), y_i), with the options of the loss.  [B]"""
        logits = logits_of(type(self).__name__, model, x, y)
        return ops.softmax_cross_entropy(
            logits, y, label_smoothing=self.label_smoothing, temperature=self.temperature, impl=self.impl
        )

    def _loss_and_gradient(self, model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy [B] and its gradient in x, which can be differentiated where grad mode is on."""
        name, differentiable = type(self).__name__, torch.is_grad_enabled()
        with torch.enable_grad():
            loss = self._cross_entropy(model, x, y)
            grad = input_gradient(name, "loss", loss.sum(), x, create_graph=differentiable)
        if differentiable:
            check_differentiable(name, "loss", grad)
        return loss, grad
