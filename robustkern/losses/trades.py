"""TRADES: predictions that an adversary cannot move."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern import ops
from robustkern.draw import Draw
from robustkern.losses.attack_loss import AscentLoss
from robustkern.losses.loss import Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class TRADES(AscentLoss):
    """total = mean_i CE(f(x_i), y_i) + weight * mean_i KL(p(x_i) || p(x'_i)), x' maximising that KL in the ball.

    orientation: the mean cross-entropy at x.  smoothness: how far the adversary moves the prediction, for which it
    needs no label.  Both predictions are differentiated.

    The weight is the published beta, 6 (written 1 / lambda in the paper).

    Args:
        weight: multiplies the smoothness term.
        eps, step_size, steps, norm, start, impl: see `robustkern.losses.attack_loss`.

    Passes: 1 + 2 steps for the attack, 6 for both terms.

    BatchNorm is in eval mode during the attack; then x and the adversaries go through the model one after the other,
    each normalised by its own batch in training mode, and both enter the running statistics, as in the published code
    (which passes x once more).  Differentiable once.  Source: Zhang et al., Theoretically principled trade-off between
    robustness and accuracy, ICML 2019.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.TRADES(weight=6.0, eps=0.1, steps=2)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 6.0

    def _objective(self, model: Model, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean = model(x)
        return lambda adversary: ops.kl_divergence(clean, model(adversary), impl=self.impl)

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        clean, attacked = self._both_logits(model, x, adversary, y)
        orientation = ops.softmax_cross_entropy(clean, y, impl=self.impl).mean()
        return Terms(orientation, ops.kl_divergence(clean, attacked, impl=self.impl).mean(), self.weight)
