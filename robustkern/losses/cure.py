"""Curvature regularisation (CURE)."""

from dataclasses import dataclass

from torch import Tensor

from robustkern import ops
from robustkern._choices import Impl
from robustkern.double_backward import fused_where_possible
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState, frozen_statistics, leaf
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class CURE(Loss):
    """total = mean_i CE_i(x_i) + weight * mean_i ||g_i(x_i + z_i) - g_i(x_i)||_2^2, g = d CE / d x, z = eps sign(g(x)).

    orientation: the mean cross-entropy at x.  smoothness: how much the input gradient changes along its own signs, a
    finite difference of the curvature in that direction.  Both gradients are differentiated, z is not.

    The paper's weight is lambda = 4 on this square; the published code's, 4 / B on the norm itself
    (`squared=False`), since its gradient is that of the batch's mean loss.

    Args:
        weight: multiplies the smoothness term.
        eps: size of the entries of z, a number or a tensor that broadcasts over a sample.  The published h, the L2
            length of z, is eps sqrt(N) for N entries: 3 for images divided by their standard deviation, of 3x32x32.
        squared: False for the norm itself.
        label_smoothing: in the cross-entropy.
        impl: "auto", "kernel" or "reference".

    x + z may leave [0, 1].  Passes: 12, twice those of a gradient penalty.

    BatchNorm: in the mode of the model; the published code fine-tunes in eval mode.  In training mode each pass is
    normalised by its own batch, only that of x enters the running statistics, and the gradients also contain the other
    samples' part (see `robustkern.batch_coupling`).  Errors, dtypes and derivatives: see `robustkern.gradient_norm`.
    Source: Moosavi-Dezfooli et al., Robustness via curvature regularization, and vice versa, CVPR 2019.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.CURE(weight=4.0, eps=0.1)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 4.0
    eps: float | Tensor = 8 / 255
    squared: bool = True
    label_smoothing: float = 0.0
    impl: Impl = "auto"

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        x, state = leaf(x), RandomState(model, x)
        with fused_where_possible(self.impl):
            loss, grad = self._loss_and_gradient(model, x, y)
            probe = (x + self.eps * grad.sign()).detach().to(x.dtype).requires_grad_()
            with frozen_statistics(model), state.again():
                _, moved = self._loss_and_gradient(model, probe, y)
            change = ops.row_norm(moved - grad, 2, squared=self.squared, impl=self.impl)
        return Terms(loss.mean(), change.mean(), self.weight)
