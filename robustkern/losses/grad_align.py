"""GradAlign: fast adversarial training that keeps input gradients in the ball aligned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern import ops
from robustkern._choices import Impl
from robustkern._dtypes import accumulation_dtype
from robustkern._options import check_options
from robustkern.attacks._common import check_batch
from robustkern.double_backward import fused_where_possible
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState, frozen_statistics
from robustkern.losses.attack_loss import AttackLoss, gradient
from robustkern.losses.loss import Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class GradAlign(AttackLoss):
    """total = mean_i CE_i(x'_i) + weight * mean_i (1 - cos(g_i(x_i), g_i(x_i + u_i))), g = d CE / d x, x' by FGSM.

    orientation: the mean cross-entropy at the adversary x' = x + step_size sign(g(x)).  smoothness: how much the input
    gradient turns on the way to a uniformly random point of the ball; where it does, one step finds no adversary, and
    fast adversarial training collapses.  g(x), which FGSM has computed, is not differentiated; g(x + u) is.  A sample
    with a zero gradient at either point has no direction and adds nothing.

    The published code divides the sum over the batch by the number of samples that have a direction; its weight is 0.2
    for eps = 8/255.

    Args:
        weight: multiplies the smoothness term.
        eps: radius of the ball in the Linf norm, in units of x; a number or a tensor that broadcasts over a sample.
        step_size: length of the step; None: eps.
        impl: "auto", "kernel" or "reference".

    x' and x + u stay in [0, 1].  Passes: 2 for FGSM, 6 for the alignment, 3 at the adversary.

    BatchNorm: all three passes see the model in its own mode, as in the published code; in training mode each is
    normalised by its own batch, only the adversaries enter the running statistics, and gradients also contain the other
    samples' part (see `robustkern.batch_coupling`).  Source: Andriushchenko and Flammarion, Understanding and improving
    fast adversarial training, NeurIPS 2020.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.GradAlign(weight=0.2, eps=0.1)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(0 <= terms.smoothness <= 2)
    True
    """

    weight: float = 0.2
    eps: float | Tensor = 8 / 255
    step_size: float | Tensor | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_options(self, box=True)

    def adversaries(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> tuple[Tensor, Tensor, RandomState]:
        """The adversaries of FGSM, the gradient at x, and the random state of the pass that computed it."""
        logits, x, y = check_batch("GradAlign", model, x, y, draw.generator, soft=True)
        step, state = self.eps if self.step_size is None else self.step_size, RandomState(model, x)
        with frozen_statistics(model):
            grad = gradient("GradAlign", lambda v: self._cross_entropy(logits, v, y), x)
        adversary = ops.attack_step(x.clone(), x, grad, eps=self.eps, step_size=step, impl=self.impl)
        return adversary, grad, state

    def terms(
        self, model: Model, x: Tensor, adversary: tuple[Tensor, Tensor, RandomState], y: Tensor, draw: Draw
    ) -> Terms:
        image, first, state = adversary
        probe = ops.attack_start(
            x.detach(), eps=self.eps, generator=draw.generator, samples=draw.samples(x), impl=self.impl
        ).requires_grad_()
        with fused_where_possible(self.impl), frozen_statistics(model), state.again():
            _, second = self._loss_and_gradient(model, probe, y)
        with state.again():
            orientation = self._cross_entropy(model, image, y).mean()
        return Terms(orientation, self._misalignment(first, second).mean(), self.weight)

    def _misalignment(self, first: Tensor, second: Tensor) -> Tensor:
        """1 - cosine, [B]; 0 where it is not defined."""
        dtype = accumulation_dtype(second.dtype)
        lengths = ops.row_norm(first, 2, impl=self.impl), ops.row_norm(second, 2, impl=self.impl)
        defined = (lengths[0] > 0) & (lengths[1] > 0)
        # Not divided by the product of both lengths, which underflows first.
        unit = first.to(dtype) / torch.where(defined, lengths[0], 1.0).view(-1, *[1] * (first.dim() - 1))
        cosine = (unit * second.to(dtype)).flatten(1).sum(1) / torch.where(defined, lengths[1], 1.0)
        return torch.where(defined, 1.0 - cosine, 0.0)
