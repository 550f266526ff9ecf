"""Virtual adversarial training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import Impl, Norm
from robustkern._classifier import logits_of
from robustkern._options import check_options
from robustkern.attacks import attacked
from robustkern.attacks._common import check_batch
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState, frozen_statistics
from robustkern.losses.attack_loss import AttackLoss, gradient
from robustkern.losses.loss import Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class VAT(AttackLoss):
    """total = mean_i CE(f(x_i), y_i) + weight * mean_i KL(p(x_i) || p(x_i + r_i)), r the direction of fastest change.

    orientation: the mean cross-entropy at x.  smoothness: how far the prediction moves along r, found without a label
    by power iteration on the Hessian of the divergence: d <- gradient of KL(p(x) || p(x + xi d)) from a random d, and r
    of length eps along the last d.  p(x) in the divergence is a target and not differentiated.

    The weight is the published alpha, 1.

    Args:
        weight: multiplies the smoothness term.
        eps: length of r in units of x, in the L2 norm; for norm "linf", r = eps sign(d).
        xi: length, in the L2 norm, of the probe.  Published code takes from 1e-6 (which loses most digits in float32)
            to 10; with 1, the default, bfloat16 still resolves the probe.
        steps: power iterations.
        norm: "l2" or "linf".
        impl: "auto", "kernel" or "reference".

    Probes and x + r stay in [0, 1].  Passes: 1 + 2 steps for the direction, 6 for both terms.

    BatchNorm is in eval mode during the power iteration; the pass at x + r is normalised by its batch in training mode
    and leaves the running statistics alone, as in the published codes.  Differentiable once.  Source: Miyato et al.,
    Virtual adversarial training, 2018.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.VAT(eps=0.5)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 1.0
    eps: float | Tensor = 1.0
    xi: float = 1.0
    steps: int = 1
    norm: Norm = "l2"
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_options(self, box=True, norm=("l2", "linf"))

    def adversaries(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        logits, x, y = check_batch("VAT", model, x, y, draw.generator, eps=self.eps, norm=self.norm, soft=True)
        with torch.inference_mode(False), attacked(model):
            with torch.no_grad():
                clean = logits(x)
            direction = draw.normal(x).to(x.dtype)
            for _ in range(self.steps):
                probe = self._moved(x, direction, self.xi, "l2")
                direction = gradient("VAT", lambda v: ops.kl_divergence(clean, logits(v), impl=self.impl), probe)
            return self._moved(x, direction, self.eps, self.norm)

    def _moved(self, x: Tensor, direction: Tensor, length: float | Tensor, norm: Norm) -> Tensor:
        return ops.attack_step(x.clone(), x, direction, eps=length, step_size=length, norm=norm, impl=self.impl)

    def terms(self, model: Model, x: Tensor, adversary: Tensor, y: Tensor, draw: Draw) -> Terms:
        state = RandomState(model, x)
        clean = logits_of("VAT", model, x, y)
        orientation = ops.softmax_cross_entropy(clean, y, impl=self.impl).mean()
        with frozen_statistics(model), state.again():
            moved = logits_of("VAT", model, adversary, y)
        return Terms(orientation, ops.kl_divergence(clean.detach(), moved, impl=self.impl).mean(), self.weight)
