"""Gradient regularisation: double backpropagation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustkern._choices import ESTIMATORS, Estimator, Impl
from robustkern._options import check_options
from robustkern.double_backward import fused_where_possible
from robustkern.draw import Draw
from robustkern.losses._finite_difference import EstimatorError, finite_difference
from robustkern.losses._passes import RandomState, frozen_statistics, leaf
from robustkern.losses.loss import Loss, Model
from robustkern.penalties import gradient_norm
from robustkern.terms import Terms


@dataclass(frozen=True)
class GradientPenalty(Loss):
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i ||eps * d CE_i / d x_i||_p.

    orientation: the mean cross-entropy.  smoothness: to first order, how much an adversary of size eps can raise it,
    when p is the dual of the threat's norm (Linf -> 1, L2 -> 2): weight = 1 is linearised adversarial training.

    Code that penalises the gradient of the batch's *mean* loss shrinks it by the batch size B: its weight w on the
    norm is w / B here, and on the squared norm w / B^2 (w / B where it sums over the batch).

    Args:
        weight: multiplies the smoothness term.
        p: 1, 2, inf or any number >= 1.
        eps: size of the perturbation in the units of x, a number or one value per channel.
        squared: eps^2 times the squared L2 norm; p = 2 only.
        label_smoothing: in the cross-entropy of both terms.
        impl: "auto", "kernel" or "reference".
        estimator: "exact" (double backpropagation), or "finite-difference": the mean norm as that of (CE_i(x_i + h eps
            * u_i) - CE_i(x_i)) / h with u_i the direction of steepest ascent, which is not differentiated.  Two plain
            steps in turn, and their memory: that of one.  It suffices for a smooth network in float32: there the step's
            gradient is off by 5e-4 to 7e-4 (ConvNeXt, ViT; best of four h).  In bfloat16 it is off by 5 to 6 % at
            best, and with ReLU and GroupNorm by as much as it is long, at every h.
        h: step of the finite difference, in units of eps: its error shrinks with h until rounding takes over, and for
            h = 1 it is what one step of an attack adds.  See `finite_difference_error`.  If squared, images move in
            proportion to their gradients, h eps in the mean (root of the mean square).

    BatchNorm in training mode couples the samples of a batch, and so their gradients; running statistics are updated
    once.  Passes: 6.  By finite differences the terms are differentiable once.

    Errors, dtypes and derivatives: see `robustkern.gradient_norm` and `robustkern.ops.softmax_cross_entropy`.
    Source: Drucker and LeCun 1991; Ross and Doshi-Velez 2018 (squared L2); Lyu et al. 2015 (the norm dual to the
    threat); Finlay and Oberman 2019 (finite differences).

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.GradientPenalty(weight=1.0, p=1, eps=8 / 255)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> terms.weight, bool(terms.smoothness > 0)
    (1.0, True)
    """

    weight: float = 1.0
    p: float = 1.0
    eps: float | Tensor = 8 / 255
    squared: bool = False
    label_smoothing: float = 0.0
    impl: Impl = "auto"
    estimator: Estimator = "exact"
    h: float = 0.1

    def __post_init__(self) -> None:
        check_options(self, estimator=ESTIMATORS)
        if self.squared and self.p != 2.0:
            raise ValueError(f"GradientPenalty: squared needs p = 2, got p = {self.p}")

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        x = leaf(x)
        if self.estimator == "finite-difference":
            return self._by_finite_difference(model, x, y)
        with fused_where_possible(self.impl):
            loss = self._cross_entropy(model, x, y)
            norm = gradient_norm(loss, x, self.p, weight=self.eps, squared=self.squared, impl=self.impl)
        return Terms(loss.mean(), norm.mean(), self.weight)

    def _by_finite_difference(self, model: Model, x: Tensor, y: Tensor) -> Terms:
        state = RandomState(model, x)

        @contextmanager
        def again() -> Iterator[None]:
            with frozen_statistics(model), state.again():
                yield

        loss_of = partial(self._cross_entropy, model, y=y)
        loss, norm = finite_difference(loss_of, again, x, self.p, self.eps, self.h, self.squared)
        return Terms(loss, norm, self.weight)

    def finite_difference_error(
        self, model: nn.Module, x: Tensor, y: Tensor, steps: Sequence[float] = (1.0, 0.1, 0.01)
    ) -> list[EstimatorError]:
        """How far finite differences are from the exact penalty, for each step h: value and parameter gradient.

        Args:
            model: as in the call, with parameters that require grad; running statistics, gradients and the random
                generators stay as they are.
            x: images.
            y: their targets.
            steps: values of h.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = RandomState(model, x)

        def smoothness(**options: Any) -> tuple[float, Tensor]:
            with frozen_statistics(model), state.again():
                term = replace(self, **options)(model, x, y).smoothness
            grads = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
            return term.item(), torch.cat([grad.flatten() for grad in grads])

        exact, exact_gradient = smoothness(estimator="exact")
        errors = []
        for h in steps:
            value, gradient = smoothness(estimator="finite-difference", h=h)
            relative = torch.linalg.vector_norm(gradient - exact_gradient) / torch.linalg.vector_norm(exact_gradient)
            errors.append(EstimatorError(h, value, exact, abs(value - exact) / abs(exact), relative.item()))
        return errors
