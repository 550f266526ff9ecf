"""What the penalties on a Jacobian share: random projections, on some of the steps and some of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkern._classifier import check_call, logits_of
from robustkern._options import check_options
from robustkern.double_backward import fused_where_possible
from robustkern.jacobian import jacobian_norm
from robustkern.losses._passes import leaf
from robustkern.ops.softmax_cross_entropy import softmax_cross_entropy
from robustkern.sharding import Shard
from robustkern.terms import Terms


@dataclass(eq=False)
class ProjectedPenalty:
    r"""total = mean_i CE(f(x_i), y_i) + weight * mean_i scale * ||M_i d f(x_i) / d x_i diag(eps)||_F^2, estimated.

    See the subclasses for M and scale.  Estimates are unbiased, by `robustkern.jacobian_norm`.

    Args:
        weight: of the smoothness term.
        projections: K; a step takes 1 + K plain ones.  "exact" for none of the randomness, and as many as classes.
        eps: multiplies the columns of the Jacobian: a number or one value per channel of x.
        law: of the projections: "orthonormal" (K at most the number of classes), "sphere", "gaussian", "rademacher".
        every: penalise one step of so many, with `every` times the weight, so that the mean over the steps stays.
        fraction: penalise that share of each batch, drawn anew each time; the mean over draws stays.  The forward pass
            then runs in two parts, and only the first is differentiated twice.  A model with BatchNorm in training
            mode needs its batch whole, and so may a model that is no `nn.Module`: there, nothing is saved by it.
        label_smoothing: in the cross-entropy.
        generator: where projections and samples are drawn from, on the device of x; None: the default one, which it
            has to be in a step that torch.compile traces.
        impl: "auto", "kernel" or "reference".
        step: calls so far, which `every` goes by.
        shard: which rows of a batch that several processes share x and y are; None: all of them.

    The call takes a model that maps x [B, ...] in [0, 1] to logits [B, C] (normalisation inside the model) and
    targets y.  Its Terms have smoothness 0 and weight 0 where a step is not penalised.  An x that requires grad is
    used as it is (which is what torch.compile of a whole step needs), any other as a new leaf; call
    `terms.backward(inputs=model.parameters())` to spare its own gradient.

    BatchNorm in training mode makes a sample's outputs depend on the others, and the smoothness with them: random
    projections then estimate mean_i sum_j ||d f(x_j) / d x_i||_F^2, "exact" is mean_i ||sum_j d f(x_j) / d x_i||_F^2.
    `robustkern.batch_coupling` says how much that is.

    What it remembers are `step` and the state of `generator`: restored, or set for each step as `robustkern train`
    does, they make a resumed training end in the same bits.
    """

    weight: float
    projections: int | Literal["exact"] = 1
    eps: float | Tensor = 1.0
    law: str = "orthonormal"
    every: int = 1
    fraction: float = 1.0
    label_smoothing: float = 0.0
    generator: torch.Generator | None = None
    impl: str = "auto"
    step: int = 0
    shard: Shard | None = None

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Terms:
        name = type(self).__name__
        y = check_call(name, model, x, y, self.generator, soft=True)
        if not self._is_due():
            orientation = self._cross_entropy(logits_of(name, model, x, y), y)
            return Terms(orientation, orientation.new_zeros(()), 0.0)
        if self.shard is not None and self.shard.size != len(x):
            raise ValueError(f"{name}: shard has {self.shard.size} rows, x has {len(x)}")
        offset, total = (self.shard.offset, self.shard.total) if self.shard else (0, len(x))
        count = min(total, max(1, round(self.fraction * total)))
        with fused_where_possible(self.impl):
            if count == total:
                x = leaf(x)
                logits = logits_of(name, model, x, y)
                norm = self._norm(logits, x, offset)
            elif _needs_the_batch_whole(model):
                x = leaf(x)
                logits = logits_of(name, model, x, y)
                norm = self._norm(logits, x, offset)[self._draw(len(x), offset, total, count, x.device)[0]]
            else:
                mine, others, first = self._draw(len(x), offset, total, count, x.device)
                chosen = leaf(x[mine])
                outputs = logits_of(name, model, chosen, y[mine])
                norm = self._norm(outputs, chosen, first)
                rest = logits_of(name, model, x[others], y[others])
                logits, y = torch.cat([outputs, rest]), torch.cat([y[mine], y[others]])
            orientation = self._cross_entropy(logits, y)
        # The mean over those chosen, be they here or elsewhere, as a mean over the rows here.
        mean = norm.mean() if len(x) == total else norm.sum() * (total / (count * len(x)))
        return Terms(orientation, self._scale(logits) * mean, self.weight * self.every)

    def _draw(self, size: int, offset: int, total: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Of the `size` rows from `offset` on: those that are penalised, the others, and how many before them are."""
        order = torch.randperm(total, generator=self.generator, device=device)
        chosen, others = (rows.sort().values for rows in (order[:count], order[count:]))
        if size == total:  # nothing to be waited for
            return chosen, others, 0
        here = [(rows >= offset) & (rows < offset + size) for rows in (chosen, others)]
        first = int((chosen < offset).sum())
        return chosen[here[0]] - offset, others[here[1]] - offset, first

    def _is_due(self) -> bool:
        if self.every == 1:  # and no counter, which torch.compile would compile anew for
            return True
        self.step += 1
        return (self.step - 1) % self.every == 0

    def _norm(self, outputs: Tensor, x: Tensor, first: int, squared: bool = True) -> Tensor:
        return jacobian_norm(
            outputs, x, self.projections, law=self.law, kind=self.kind, weight=self.eps, squared=squared,
            generator=self.generator, first=first, impl=self.impl,
        )  # fmt: skip

    def _scale(self, logits: Tensor) -> float:
        return 1.0

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, y, label_smoothing=self.label_smoothing, impl=self.impl).mean()


def _needs_the_batch_whole(model: Callable[[Tensor], Tensor]) -> bool:
    """Whether two parts of a batch would give other outputs, or other running statistics, than the batch does."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        return True  # what it calls cannot be seen, or is of one batch size
    for module in model.modules():
        tracks = getattr(module, "running_mean", None) is not None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not tracks):
            return True
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and tracks:
            return True
    return False
