"""Jacobian regularisation: logits that change little in any direction."""

from dataclasses import dataclass
from typing import ClassVar

from robustkern._choices import Kind
from robustkern.losses.projected_penalty import ProjectedPenalty


@dataclass(frozen=True)
class JacobianPenalty(ProjectedPenalty):
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i ||d f(x_i) / d x_i diag(eps)||_F^2.

    orientation: the mean cross-entropy.  smoothness: to first order, the mean squared change of the logits under a
    perturbation of independent entries +-eps; it needs no label.

    Other conventions, with eps = 1 unless their inputs are divided by a standard deviation; then eps = std:

        Hoffman et al. 2019         lambda / 2 ||J||_F^2                        weight = lambda / 2 (0.01 / 2: default)
        Jakubovitz and Giryes 2018  lambda ||J||_F, over all classes            weight = lambda, squared=False

    Args:
        weight: multiplies the smoothness term.
        projections: K, or "exact".
        eps: size of the perturbation in the units of x, a number or one value per channel.
        law, fraction, label_smoothing, impl: see `robustkern.losses.projected_penalty`.
        squared: False for the norm itself, estimated by the root of the estimate: too small on average, unless exact.

    BatchNorm in training mode adds the other samples' part; see `robustkern.batch_coupling`. Errors, dtypes and
    derivatives: see `robustkern.jacobian_norm` and `robustkern.ops.softmax_cross_entropy`.
    Source: Hoffman, Roberts and Yaida 2019.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.JacobianPenalty(weight=0.01, projections="exact")(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(torch.isclose(terms.smoothness, model.weight.square().sum()))  # the Jacobian is the weight
    True
    """

    weight: float = 0.005
    squared: bool = True

    kind: ClassVar[Kind] = "plain"
