"""Gradient regularisation: double backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustkern.double_backward import fused_where_possible
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.penalties import gradient_norm
from robustkern.terms import Terms


@dataclass(frozen=True)
class GradientPenalty:
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i ||eps * d CE_i / d x_i||_p.

    orientation: the mean cross-entropy.  smoothness: to first order, how much an adversary of size eps can raise it,
    when p is the dual of the threat's norm (Linf -> 1, L2 -> 2): weight = 1 is linearised adversarial training.

    The weight multiplies the batch mean of a per-sample quantity, so it depends neither on the batch size nor on
    the number of processes. Codes that penalise the gradient of the batch's *mean* loss shrink it by the batch size
    B: their weight w on the norm is w / B here, and on the squared norm w / B^2 (w / B where they sum over the
    batch).

    Args:
        weight: of the smoothness term.
        p: 1, 2, inf or any number >= 1.
        eps: size of the perturbation in the units of x, a number or one value per channel.
        squared: eps^2 times the squared L2 norm; p = 2 only.
        label_smoothing: in the cross-entropy of both terms.
        impl: "auto", "kernel" or "reference".

    The call takes a model that maps x [B, ...] in [0, 1] to logits [B, C] (normalisation inside the model) and
    targets y.  An x that requires grad is used as it is (which is what torch.compile of a whole step needs), any
    other as a new leaf; call `terms.backward(inputs=model.parameters())` to spare its own gradient.  BatchNorm in
    training mode couples the samples of a batch, and the gradient of one sample's loss with them; running
    statistics are updated once.

    Errors, dtypes and derivatives: see `robustkern.gradient_norm` and `robustkern.ops.softmax_cross_entropy`.
    Source: Drucker and LeCun 1991; Ross and Doshi-Velez 2018 (squared L2); Lyu et al. 2015 (the norm dual to the
    threat).
    """

    weight: float = 1.0
    p: float = 1.0
    eps: float | Tensor = 8 / 255
    squared: bool = False
    label_smoothing: float = 0.0
    impl: str = "auto"

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Terms:
        if not x.is_floating_point():
            raise TypeError(f"GradientPenalty: x must be a floating-point tensor, got {x.dtype}")
        x = x if x.requires_grad else x.detach().requires_grad_()
        with fused_where_possible(self.impl):
            loss = softmax_cross_entropy(model(x), y, label_smoothing=self.label_smoothing, impl=self.impl)
            norm = gradient_norm(loss, x, self.p, weight=self.eps, squared=self.squared, impl=self.impl)
        return Terms(loss.mean(), norm.mean(), self.weight)
