"""Cross-Lipschitz regularisation: differences of logits that change little in any direction."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustkern._choices import Kind
from robustkern.losses.projected_penalty import ProjectedPenalty


@dataclass(frozen=True)
class CrossLipschitz(ProjectedPenalty):
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i 1/C^2 sum_lm ||eps * (d f_l - d f_m) / d x_i||_2^2.

    orientation: the mean cross-entropy.  smoothness: the mean over all pairs of classes, which bounds how fast one can
    overtake another; it is 2/C ||(I - 11^T/C) J diag(eps)||_F^2, blind to what moves all logits alike, as the softmax
    is.

    With eps = 1 the weight is the lambda of Hein and Andriushchenko, whose penalty is lambda / (n C^2) times the sum
    over the n samples of a batch and all pairs; 1e-4 is their example.

    Args:
        weight: multiplies the smoothness term.
        projections: K, or "exact".
        eps: size of the perturbation in the units of x, a number or one value per channel.
        law, fraction, label_smoothing, impl: see `robustkern.losses.projected_penalty`.

    BatchNorm in training mode adds the other samples' part; see `robustkern.batch_coupling`. Errors, dtypes and
    derivatives: see `robustkern.jacobian_norm` and `robustkern.ops.softmax_cross_entropy`.
    Source: Hein and Andriushchenko 2017.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.CrossLipschitz(weight=0.01, projections=2)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 1e-4

    kind: ClassVar[Kind] = "centred"

    def _scale(self, logits: Tensor) -> float:
        return 2.0 / logits.shape[1]
