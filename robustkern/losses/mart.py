"""MART: TRADES's term counts most where the clean prediction is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustkern import ops
from robustkern._dtypes import accumulation_dtype
from robustkern.draw import Draw
from robustkern.losses.attack_loss import AscentLoss
from robustkern.losses.loss import Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class MART(AscentLoss):
    """total = mean_i BCE(p(x'_i), y_i) + weight * mean_i (1 - p_y(x_i)) KL(p(x_i) || p(x'_i)).

    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k), and x' maximises the cross-entropy in the ball.

    orientation: the boosted cross-entropy at the adversary, with a margin to the runner-up.  smoothness: how far the
    adversary moves the prediction, weighted by how wrong that at x is.  All three predictions are differentiated, the
    weighting included.  log(1 - p) is computed from the logits: the 1.0001 and 1e-12 of the published code, which keep
    its logarithms finite, are not needed.

    The weight is the published lambda: 5 for ResNet-18, 6 for WideResNets.

    Args:
        weight: multiplies the smoothness term.
        eps, step_size, steps, norm, start, impl: see `robustkern.losses.attack_loss`.

    Passes: 2 steps for the attack, 6 for both terms.

    BatchNorm is in eval mode during the attack; then x and the adversaries go through the model one after the other,
    each normalised by its own batch in training mode, and both enter the running statistics, as in the published code.
    Differentiable once.  Source: Wang et al., Improving adversarial robustness requires revisiting misclassified
    examples, ICLR 2020.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.MART(weight=5.0, eps=0.1, steps=2)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 5.0

    soft: ClassVar[bool] = False  # the margin to the runner-up is that of one class

    def _objective(self, model: Model, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda adversary: ops.softmax_cross_entropy(model(adversary), y, impl=self.impl)

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        clean, attacked = self._both_logits(model, x, adversary, y)
        boosted = ops.softmax_cross_entropy(attacked, y, impl=self.impl) - _log_without_runner_up(attacked, y)
        doubt = 1.0 - (-ops.softmax_cross_entropy(clean, y, impl=self.impl)).exp()
        divergence = ops.kl_divergence(clean, attacked, impl=self.impl)
        return Terms(boosted.mean(), (doubt * divergence).mean(), self.weight)


def _log_without_runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """log(1 - max_{k != y} p_k), [B]: the log of the share of all classes but that one."""
    z = logits.to(accumulation_dtype(logits.dtype))
    runner_up = z.detach().scatter(1, y[:, None].long(), float("-inf")).argmax(1, keepdim=True)
    return z.scatter(1, runner_up, float("-inf")).logsumexp(1) - z.logsumexp(1)
