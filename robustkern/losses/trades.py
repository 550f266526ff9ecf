"""TRADES: predictions that an adversary cannot move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern._classifier import logits_of
from robustkern.attacks._common import Model
from robustkern.losses._passes import Draws
from robustkern.losses.attack_loss import AscentLoss
from robustkern.ops.kl_divergence import kl_divergence
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.terms import Terms


@dataclass(eq=False)
class TRADES(AscentLoss):
    """total = mean_i CE(f(x_i), y_i) + weight * mean_i KL(p(x_i) || p(x'_i)), x' maximising that KL in the ball.

    orientation: the mean cross-entropy at x.  smoothness: how far the adversary moves the prediction, for which it
    needs no label.  Both predictions are differentiated.

    The weight multiplies the batch mean of a per-sample quantity, so it depends neither on the batch size nor on the
    number of processes; it is the published beta, 6 (written 1 / lambda in the paper).

    Args:
        weight: of the smoothness term.
        eps, step_size, steps, norm, start, impl, generator, shard: see `robustkern.losses.attack_loss`.

    The call takes a model that maps x [B, ...] in [0, 1] to logits [B, C] (normalisation inside the model) and classes
    y.  Passes: 1 + 2 steps for the attack, 6 for both terms.

    BatchNorm is in eval mode during the attack; then x and the adversaries go through the model one after the other,
    each normalised by its own batch in training mode, and both enter the running statistics, as in the published code
    (which passes x once more).  Differentiable once.  Source: Zhang et al., Theoretically principled trade-off between
    robustness and accuracy, ICML 2019.
    """

    weight: float = 6.0

    def _objective(self, model: Model, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean = model(x)
        return lambda adversary: kl_divergence(clean, model(adversary), impl=self.impl)

    def terms(self, model: nn.Module, x: Tensor, adversary: Tensor, y: Tensor) -> Terms:
        draws = Draws(model, x)
        clean = logits_of("TRADES", model, x, y)
        with draws.again():
            attacked = logits_of("TRADES", model, adversary, y)
        orientation = softmax_cross_entropy(clean, y, impl=self.impl).mean()
        return Terms(orientation, kl_divergence(clean, attacked, impl=self.impl).mean(), self.weight)
