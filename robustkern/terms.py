"""The two parts of a robust loss: a term that orients the decision boundary and one that makes it smooth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Terms(NamedTuple):
    """total = orientation + weight * smoothness, both means over the batch of a per-sample quantity.

    Since neither term depends on the batch size, neither does the meaning of the weight.

    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> terms = rk.Terms(orientation=3 * w, smoothness=w.square(), weight=0.5)
    >>> terms.total.item()
    8.0
    >>> terms.backward()
    >>> w.grad.item()
    5.0
    """

    orientation: Tensor  # scalar: expected loss
    smoothness: Tensor  # scalar: local Lipschitz constant, or what stands for it
    weight: float

    @property
    def total(self) -> Tensor:
        """orientation + weight * smoothness."""
        return self.orientation + self.weight * self.smoothness if self.weight else self.orientation

    def backward(self, inputs: Iterable[Tensor] | None = None) -> None:
        """total.backward().

        Args:
            inputs: accumulate gradients into these only, such as model.parameters().  Without it the gradient with
                respect to the input batch is computed once more and thrown away.

        Raises:
            ValueError: The total has no graph.
        """
        total = self.total
        if not total.requires_grad:
            raise ValueError(
                "Terms: total must have a graph, got one without: the model was called under torch.no_grad(), "
                "its outputs were detached, or all of its parameters are frozen"
            )
        total.backward(inputs=None if inputs is None else list(inputs))

    def detach(self) -> Terms:
        """The same values, without the graph: for logging."""
        return Terms(self.orientation.detach(), self.smoothness.detach(), self.weight)
