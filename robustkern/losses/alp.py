"""Adversarial logit pairing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern._classifier import logits_of
from robustkern._dtypes import accumulation_dtype
from robustkern.attacks import FGSM, NFGSM, PGD
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState
from robustkern.losses.attack_loss import AttackLoss
from robustkern.losses.loss import Model
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.terms import Terms

_PGD_10 = PGD(8 / 255, 2 / 255, steps=10)


@dataclass(frozen=True)
class ALP(AttackLoss):
    """total = mean_i CE(f(x'_i), y_i) + weight * mean_i ||f(x_i) - f(x'_i)||_2^2, x' by an attack.

    orientation: the mean cross-entropy at the adversary.  smoothness: the mean squared distance between the logits of
    an image and its adversary, summed over the classes; both are differentiated.

    A code that averages over the classes as well writes the weight C times as large.

    The published robustness did not stand stronger attacks (Engstrom et al. 2018): it is here for comparison.

    Args:
        attack: `robustkern.attacks.PGD`, `FGSM` or `NFGSM`, or anything with the same call.
        weight: of the smoothness term; 0.5 as published.
        impl: "auto", "kernel" or "reference".

    Passes: the attack's, and 6 for both terms.

    BatchNorm is in eval mode during the attack; then x and the adversaries go through the model one after the other,
    each normalised by its own batch in training mode, and both enter the running statistics.  Differentiable once.
    Source: Kannan et al., Adversarial logit pairing, 2018.
    """

    attack: FGSM | NFGSM | PGD = _PGD_10
    weight: float = 0.5
    impl: str = "auto"

    def adversaries(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        return self.attack(model, x, y, draw.generator, indices=draw.samples(x))

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        state = RandomState(model, x)
        clean = logits_of("ALP", model, x, y)
        with state.again():
            attacked = logits_of("ALP", model, adversary, y)
        orientation = softmax_cross_entropy(attacked, y, impl=self.impl).mean()
        dtype: torch.dtype = accumulation_dtype(clean.dtype)
        return Terms(orientation, (clean.to(dtype) - attacked.to(dtype)).square().sum(1).mean(), self.weight)
