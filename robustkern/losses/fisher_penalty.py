"""Fisher information regularisation: a predictive distribution that changes little in any direction."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustkern._choices import Kind
from robustkern.losses.projected_penalty import ProjectedPenalty


@dataclass(frozen=True)
class FisherPenalty(ProjectedPenalty):
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i tr(diag(eps) J_i^T (diag p_i - p_i p_i^T) J_i diag(eps)).

    orientation: the mean cross-entropy.  smoothness: the trace of the Fisher information of p = softmax(f(x)) in the
    input; half of it is, to second order, the mean KL(p(x) || p(x + delta)) over perturbations delta of independent
    entries +-eps.  It needs no label, and is differentiated through p too.  A network can make it small by being
    certain, which is why the cross-entropy may need label smoothing.

    Other conventions:

        Shen et al. 2019            lambda tr(FIM)                  weight = lambda
        Helland and VanHoudnos      lambda / 2 tr(FIM), as meant    weight = lambda / 2 (1 / 2: default)

    The published code of the latter multiplies the gradient of a *logit* by 1 / p, which belongs to that of p, and
    takes the first class only: its values are not comparable.

    Args:
        weight: multiplies the smoothness term.
        projections: K, or "exact".
        eps: size of the perturbation in the units of x, a number or one value per channel.
        law, fraction, label_smoothing, impl: see `robustkern.losses.projected_penalty`.

    BatchNorm in training mode adds the other samples' part; see `robustkern.batch_coupling`. Errors, dtypes and
    derivatives: see `robustkern.jacobian_norm` and `robustkern.ops.softmax_cross_entropy`.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.FisherPenalty(weight=0.5, projections=1, eps=8 / 255)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 0.5
    eps: float | Tensor = 8 / 255

    kind: ClassVar[Kind] = "fisher"
