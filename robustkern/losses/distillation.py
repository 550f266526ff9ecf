"""Defensive distillation: another network's predictions as targets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern import ops
from robustkern._choices import Impl
from robustkern._classifier import check_logits
from robustkern.attacks import attacked
from robustkern.draw import Draw
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class Distillation(Loss):
    """total = mean_i -sum_c t_ic log softmax(f(x_i) / T)_c, with t_i = softmax(teacher(x_i) / T).

    orientation: the mean cross-entropy against the teacher, both at temperature T.  smoothness: none of its own (0,
    with weight 0): the targets are smooth.

    A control among the robust methods.  Trained at T and used at 1, the network's logits are T times too large, its
    softmax saturates and gradients of the cross-entropy round to zero: attacks on that loss fail, others do not.
    Gradients include a factor 1 / T, for which the learning rate has to make up.

    Args:
        teacher: maps x to logits [B, C]; moved to the device of x, used in eval mode, without gradients, and otherwise
            left unchanged.
        temperature: T > 0.
        impl: "auto", "kernel" or "reference".

    y is not used.  Passes: 4, one of them the teacher's.
    BatchNorm: in the mode of the model.  Errors, dtypes and derivatives: see `robustkern.ops.softmax_cross_entropy`.
    Source: Papernot et al., Distillation as a defense to adversarial perturbations against deep neural networks, 2016;
    refuted by Carlini and Wagner, 2017.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.Distillation(nn.Linear(6, 3), temperature=20.0)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.orientation > 0)
    True
    """

    teacher: nn.Module
    temperature: float = 100.0
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"Distillation: teacher must be a module, got {type(self.teacher).__name__}")
        super().__post_init__()

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        teacher = self.teacher.to(x.device)
        with torch.no_grad(), attacked(teacher):
            taught = (teacher(x).float() / self.temperature).softmax(1)
        logits = model(x)
        check_logits("Distillation", logits, len(x))
        if logits.shape != taught.shape:
            raise ValueError(
                f"Distillation: teacher gives logits of shape {list(taught.shape)}, the model {list(logits.shape)}"
            )
        orientation = ops.softmax_cross_entropy(logits, taught, temperature=self.temperature, impl=self.impl).mean()
        return Terms(orientation, orientation.new_zeros(()), 0.0)
