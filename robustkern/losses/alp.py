"""Adversarial logit pairing."""

from dataclasses import dataclass

from torch import Tensor

from robustkern import ops
from robustkern._choices import Impl
from robustkern._dtypes import accumulation_dtype
from robustkern.draw import Draw
from robustkern.losses.attack_loss import GivenAttackLoss
from robustkern.losses.loss import Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class ALP(GivenAttackLoss):
    """total = mean_i CE(f(x'_i), y_i) + weight * mean_i ||f(x_i) - f(x'_i)||_2^2, x' by an attack.

    orientation: the mean cross-entropy at the adversary.  smoothness: the mean squared distance between the logits of
    an image and its adversary, summed over the classes; both are differentiated.

    Code that also averages over the classes needs a weight C times as large.

    The published robustness did not hold against stronger attacks (Engstrom et al. 2018): ALP is here for comparison.

    Args:
        attack: `robustkern.attacks.PGD`, `FGSM` or `NFGSM`, or anything with the same call.
        weight: multiplies the smoothness term; 0.5 as published.
        impl: "auto", "kernel" or "reference".

    Passes: the attack's, and 6 for both terms.

    BatchNorm is in eval mode during the attack; then x and the adversaries go through the model one after the other,
    each normalised by its own batch in training mode, and both enter the running statistics.  Differentiable once.
    Source: Kannan et al., Adversarial logit pairing, 2018.

    >>> from robustkern.attacks import PGD
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.ALP(PGD(0.1, steps=2))(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 0.5
    impl: Impl = "auto"

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        clean, attacked = self._both_logits(model, x, adversary, y)
        orientation = ops.softmax_cross_entropy(attacked, y, impl=self.impl).mean()
        dtype = accumulation_dtype(clean.dtype)
        return Terms(orientation, (clean.to(dtype) - attacked.to(dtype)).square().sum(1).mean(), self.weight)
