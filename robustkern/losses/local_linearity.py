"""Local linearity regularisation (LLR)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustkern._choices import Start
from robustkern._classifier import gradient_of
from robustkern.double_backward import fused_where_possible
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState, frozen_statistics, leaf
from robustkern.losses.attack_loss import AscentLoss
from robustkern.losses.loss import Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class LocalLinearity(AscentLoss):
    """total = mean_i CE_i(x_i) + weight * mean_i (gamma_i + ratio |delta_i . g_i|), g_i = d CE_i / d x_i.

    gamma_i = |CE_i(x_i + delta_i) - CE_i(x_i) - delta_i . g_i|, at the delta_i of the ball where it is largest.

    orientation: the mean cross-entropy at x.  smoothness: gamma, how far the loss is from linear around x, and how
    steep it is in that direction.  Together they bound what an adversary can add.  g is differentiated, delta is not.

    Published: lambda gamma + mu |delta . g| with lambda = 4, mu = 3: weight = lambda and ratio = mu / lambda.

    Args:
        weight: multiplies the smoothness term.
        ratio: factor on the steepness, |delta . g|, relative to gamma.
        eps, step_size, steps, norm, start, impl: see `robustkern.losses.attack_loss`; two steps from a uniform start.

    Passes: 2 + 2 steps for delta, 6 for the loss and its gradient, 3 at x + delta.

    BatchNorm is in eval mode in the search for delta; then, in training mode, both passes are normalised by their own
    batches, only that of x enters the running statistics, and g also contains the other samples' part (see
    `robustkern.batch_coupling`).  Source: Qin et al., Adversarial robustness through local linearization, NeurIPS 2019.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.LocalLinearity(eps=0.1, steps=2)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 4.0
    ratio: float = 0.75

    steps: int = field(default=2, kw_only=True)
    start: Start = field(default="uniform", kw_only=True)

    def _objective(self, model: Model, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():
            center = x.detach().requires_grad_()
            loss = self._cross_entropy(model, center, y)
            grad = gradient_of("LocalLinearity", loss, center)
        loss = loss.detach()
        return lambda v: (self._cross_entropy(model, v, y) - loss - _dot(v - x, grad)).abs()

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        x, state = leaf(x), RandomState(model, x)
        with fused_where_possible(self.impl):
            loss, grad = self._loss_and_gradient(model, x, y)
            with frozen_statistics(model), state.again():
                moved = self._cross_entropy(model, adversary, y)
        linear = _dot(adversary - x.detach(), grad)
        gap = (moved - loss - linear).abs()
        return Terms(loss.mean(), (gap + self.ratio * linear.abs()).mean(), self.weight)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product for each sample, in float32 for 16-bit data.  [B]"""
    product = a * b if a.dtype.itemsize > 2 else a.float() * b.float()
    return product.flatten(1).sum(1)
