"""Adversarial weight perturbation (AWP)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern._input_gradient import check_graph
from robustkern.draw import Draw
from robustkern.losses._passes import RandomState, frozen_statistics
from robustkern.losses.attack_loss import AttackLoss
from robustkern.losses.loss import Loss, Model
from robustkern.terms import Terms


@dataclass(frozen=True)
class AWP(Loss):
    """total = L(w + v), v_l = gamma ||w_l||_2 g_l / ||g_l||_2, g = dL / dw: a loss where the weights are worst.

    orientation and smoothness: those of the loss, at the perturbed weights.  Every weight of two or more dimensions is
    a layer l; biases and the parameters of normalisation layers are not perturbed.  Adversaries are found once, at the
    unperturbed weights.

    The weights themselves are never touched: the model is called with w + v in their place, through which the gradient
    of the total reaches w.  Whatever happens inside, they keep their bits.  The published code takes a step of an
    optimizer on a copy of the model instead; scaled to gamma ||w_l||, the first step of SGD points along g.

    Args:
        loss: any loss of `robustkern.losses`, or a function called like one.
        gamma: length of the perturbation, relative to the weight; 0.01 for adversarial training, 0.005 for TRADES as
            published, which begins after ten epochs.  0: no perturbation, at no cost.

    The perturbation is that of the loss at its own weight: replacing `Terms.weight`, as a ramp does, changes the total
    at the perturbed weights, but not the perturbation.

    The loss has the same draw at both weights and draws the same random numbers, as do layers such as dropout.

    Passes: those of the loss, and all but its attack's once more (4 for adversarial training).
    BatchNorm: the pass that gives v leaves the running statistics alone; the other is the loss's own.  Differentiable
    once.  Source: Wu et al., Adversarial weight perturbation helps robust generalization, NeurIPS 2020.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> terms = rk.losses.AWP(rk.losses.TRADES(eps=0.1, steps=2), gamma=0.005)(model, x, y)
    >>> terms.backward(inputs=model.parameters())
    >>> bool(terms.smoothness >= 0)
    True
    """

    loss: Callable[..., Terms]
    gamma: float = 0.01

    def _terms(self, model: Model, x: Tensor, y: Tensor, draw: Draw) -> Terms:
        if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(f"AWP: model must be an nn.Module, whose weights it perturbs, got {type(model).__name__}")
        if self.gamma == 0.0:
            return self.loss(model, x, y, draw)
        inner = self.loss
        loss: Callable[[nn.Module], Terms]
        if isinstance(inner, AttackLoss):
            found = inner.adversaries(model, x, y, draw)
            loss = lambda perturbed: inner.terms(perturbed, x, found, y, draw)  # noqa: E731
        else:
            loss = lambda perturbed: inner(perturbed, x, y, draw)  # noqa: E731
        with torch.enable_grad(), RandomState(model, x, draw.generator).again(), frozen_statistics(model):
            offsets = self._offsets(model, loss(model).total, draw)
        return loss(_Perturbed(model, offsets))

    def _offsets(self, model: nn.Module, total: Tensor, draw: Draw) -> dict[str, Tensor]:
        """v, by the name of the weight."""
        check_graph("AWP", "total", total)
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad and w.dim() > 1}
        grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True, materialize_grads=True)
        if draw.shard is not None:
            draw.shard.average_(grads)
        offsets = {}
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            length = torch.linalg.vector_norm(grad)
            scale = torch.where(length > 0, self.gamma * torch.linalg.vector_norm(weight.detach()) / length, 0.0)
            offsets[name] = scale * grad
        return offsets


class _Perturbed(nn.Module):
    """A model, called with some of its weights moved."""

    def __init__(self, model: nn.Module, offsets: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.offsets = model, offsets
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.model.named_parameters())
        moved = {name: weights[name] + offset for name, offset in self.offsets.items()}
        result: Tensor = torch.func.functional_call(self.model, moved, (x,))
        return result
