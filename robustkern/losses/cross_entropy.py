"""Standard training: orientation without smoothness."""

from dataclasses import dataclass

from torch import Tensor

from robustkern._choices import Impl
from robustkern.draw import Draw
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """total = mean_i CE(f(x_i), y_i).

    orientation: the mean cross-entropy.  smoothness: none (0, with weight 0).

    Args:
        label_smoothing: share of the target spread evenly over the classes, in [0, 1].
        temperature: divides the logits.
        impl: "auto", "kernel" or "reference".

    Errors, dtypes and derivatives: see `robustkern.ops.softmax_cross_entropy`.

    >>> terms = rk.losses.CrossEntropy()(nn.Flatten(), torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> round(terms.total.item(), 4)  # log 4
    1.3863
    """

    label_smoothing: float = 0.0
    temperature: float = 1.0
    impl: Impl = "auto"

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        orientation = self._cross_entropy(model, x, y).mean()
        return Terms(orientation, orientation.new_zeros(()), 0.0)
