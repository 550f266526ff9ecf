"""Adversarial training: the loss at the worst image nearby."""

from dataclasses import dataclass

from torch import Tensor

from robustkern._choices import Impl
from robustkern._classifier import logits_of
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState, Rise, value_without_graph
from robustkern.losses.attack_loss import GivenAttackLoss
from robustkern.losses.loss import Model
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.terms import Terms


@dataclass(frozen=True)
class AdversarialTraining(GivenAttackLoss):
    """total = mean_i CE(f(x_i), y_i) + weight * mean_i (CE(f(x'_i), y_i) - CE(f(x_i), y_i)), x' by an attack.

    orientation: the mean cross-entropy at x.  smoothness: how much the attack raises it; to first order eps times the
    dual norm of the input gradient.  With weight 1, the default, the total is the cross-entropy at the adversary, as
    published; with 1/2, half of each (Goodfellow et al.).  `PGD` hands over the best of its iterates, where the
    published code takes the last.

    Args:
        attack: `robustkern.attacks.FGSM`, `NFGSM` or `PGD`, or anything with the same call.
        weight: multiplies the smoothness term.
        label_smoothing: in the cross-entropy of both terms.
        impl: "auto", "kernel" or "reference".

    Passes: the attack's, 3 at the adversary, and 1 at x for the value of the orientation, whose gradient cancels
    at weight 1; at any other weight, and where `Terms.weight` was replaced, its backward pass costs 3 more.

    BatchNorm is in eval mode during the attack, as in the published codes; then the adversaries go through the model
    in its own mode; in training mode, they alone enter the running statistics.
    Differentiable once.  Sources: Goodfellow et al. 2015; Madry et al. 2018; Wong et al. 2020 (FGSM with random start).

    >>> from robustkern.attacks import FGSM
    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.AdversarialTraining(FGSM(0.1))(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.total > 0)
    True
    """

    weight: float = 1.0
    label_smoothing: float = 0.0
    impl: Impl = "auto"

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        def cross_entropy(logits: Tensor) -> Tensor:
            return softmax_cross_entropy(logits, y, label_smoothing=self.label_smoothing, impl=self.impl).mean()

        state = RandomState(model, x)
        orientation = value_without_graph(model, cross_entropy, x.detach(), state)
        with state.again():
            attacked = logits_of("AdversarialTraining", model, adversary, y)
        return Rise.of(orientation, cross_entropy(attacked), self.weight)
