"""What the penalties on a Jacobian share: random projections, of all or some of the samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkern._choices import Impl, Kind, Law
from robustkern._classifier import logits_of
from robustkern.double_backward import fused_where_possible
from robustkern.draw import Draw
from robustkern.jacobian import jacobian_norm
from robustkern.losses._passes import leaf
from robustkern.losses.loss import Loss, Model
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.terms import Terms


@dataclass(frozen=True)
class ProjectedPenalty(Loss):
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i scale * ||M_i d f(x_i) / d x_i diag(eps)||_F^2, estimated.

    See the subclasses for M and scale.  Estimates are unbiased, by `robustkern.jacobian_norm`.

    Args:
        weight: multiplies the smoothness term.
        projections: K; a step takes as long as 1 + K plain ones.  "exact": not random, with K the number of classes.
        eps: multiplies the columns of the Jacobian: a number or one value per channel of x.
        law: of the projections: "orthonormal" (K at most the number of classes), "sphere", "gaussian", "rademacher".
        fraction: penalise that share of each batch, drawn anew each time; the expected value stays.  The forward pass
            then runs in two parts, and only the first is differentiated twice.  A model with BatchNorm in training
            mode needs its batch whole, and so may a model that is not an `nn.Module`: there it saves nothing.
        label_smoothing: in the cross-entropy.
        impl: "auto", "kernel" or "reference".

    Projections and samples are drawn from the draw's generator, by the rows of the whole batch.

    BatchNorm in training mode makes a sample's outputs depend on the others, and the smoothness with them: random
    projections then estimate mean_i sum_j ||d f(x_j) / d x_i||_F^2, "exact" is mean_i ||sum_j d f(x_j) / d x_i||_F^2.
    `robustkern.batch_coupling` measures how much that is.
    """

    weight: float
    projections: int | Literal["exact"] = 1
    eps: float | Tensor = 1.0
    law: Law = "orthonormal"
    fraction: float = 1.0
    label_smoothing: float = 0.0
    impl: Impl = "auto"

    kind: ClassVar[Kind]
    squared = True

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        name, generator = type(self).__name__, draw.generator
        offset, total = (draw.shard.offset, draw.shard.total) if draw.shard else (0, len(x))
        count = min(total, max(1, round(self.fraction * total)))
        with fused_where_possible(self.impl):
            if count == total or _needs_the_batch_whole(model):
                x = leaf(x)
                logits = logits_of(name, model, x, y)
                norm = self._norm(logits, x, offset, generator)
                if count < total:
                    norm = norm[_choose(x, offset, total, count, generator)[0]]
            else:
                mine, others, first = _choose(x, offset, total, count, generator)
                chosen = leaf(x[mine])
                outputs = logits_of(name, model, chosen, y[mine])
                norm = self._norm(outputs, chosen, first, generator)
                rest = logits_of(name, model, x[others], y[others])
                logits, y = torch.cat([outputs, rest]), torch.cat([y[mine], y[others]])
            loss = softmax_cross_entropy(logits, y, label_smoothing=self.label_smoothing, impl=self.impl)
        # Scaled so that the processes' means, weighted by their shares, add up to the mean over all chosen samples.
        mean = norm.mean() if len(x) == total else norm.sum() * (total / (count * len(x)))
        return Terms(loss.mean(), self._scale(logits) * mean, self.weight)

    def _norm(self, outputs: Tensor, x: Tensor, first: int, generator: torch.Generator | None) -> Tensor:
        return jacobian_norm(
            outputs, x, self.projections, law=self.law, kind=self.kind, weight=self.eps, squared=self.squared,
            generator=generator, first=first, impl=self.impl,
        )  # fmt: skip

    def _scale(self, logits: Tensor) -> float:
        return 1.0


def _needs_the_batch_whole(model: Model) -> bool:
    """Whether two parts of a batch would give other outputs, or other running statistics, than the batch does."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        return True  # what it calls cannot be seen, or has a fixed batch size
    for module in model.modules():
        tracks = getattr(module, "running_mean", None) is not None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not tracks):
            return True
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and tracks:
            return True
    return False


def _choose(
    x: Tensor, offset: int, total: int, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, int]:
    """Among the rows of x, which begin at `offset`: the penalised ones, the others, how many penalised precede them."""
    order = torch.randperm(total, generator=generator, device=x.device)
    chosen, others = (rows.sort().values for rows in (order[:count], order[count:]))
    if len(x) == total:  # needs no waiting for the device
        return chosen, others, 0
    here = [(rows >= offset) & (rows < offset + len(x)) for rows in (chosen, others)]
    first = int((chosen < offset).sum())
    return chosen[here[0]] - offset, others[here[1]] - offset, first
