"""Label smoothing: outputs that are smooth, whatever the inputs do."""

from dataclasses import dataclass

from torch import Tensor

from robustkern import ops
from robustkern._choices import Impl
from robustkern._classifier import logits_of
from robustkern.draw import Draw
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class LabelSmoothing(Loss):
    """total = (1 - weight) mean_i CE(f(x_i), y_i) + weight * mean_i 1/C sum_c -log p_ic.

    orientation: the cross-entropy's share, (1 - weight) of its mean.  smoothness: the mean over the classes of -log p,
    least for a uniform prediction: smooth outputs, not a smooth function.  The total is the cross-entropy against
    targets (1 - s) e_y + s / C with s = weight.

    A control among the robust methods: it flattens predictions, not the function.

    Args:
        weight: s, in [0, 1].
        impl: "auto", "kernel" or "reference".

    Passes: 3, a plain step.
    BatchNorm: in the mode of the model.  Errors, dtypes and derivatives: see `robustkern.ops.softmax_cross_entropy`.
    Source: Szegedy et al., Rethinking the Inception architecture for computer vision, CVPR 2016.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.LabelSmoothing(weight=0.1)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    weight: float = 0.1
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"LabelSmoothing: weight must be in [0, 1], got {self.weight}")

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        logits = logits_of("LabelSmoothing", model, x, y)
        certain, uniform = (ops.softmax_cross_entropy(logits, y, label_smoothing=s, impl=self.impl) for s in (0.0, 1.0))
        return Terms((1.0 - self.weight) * certain.mean(), uniform.mean(), self.weight)
