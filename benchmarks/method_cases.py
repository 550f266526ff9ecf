"""Every training method: robustkern's loss, and the step that one writes by hand in stock PyTorch from its formula.

The stock code is written with care: attacks ask for input gradients only, predictions that do not change are computed
once, and BatchNorm is in eval mode during an attack where the published codes have it so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern import losses
from robustkern.attacks import FGSM, NFGSM, PGD

EPS = 8 / 255
STEPS = 10
SIZE = 2.5 * EPS / STEPS

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, x, y -> what is differentiated by the parameters


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: Its name there.
        passes: The passes of robustkern's step; a plain step has 3.
        loss: robustkern's loss.
        stock: The same step by hand.
    """

    name: str
    passes: int
    loss: Any
    stock: Step


def _ball(adversary: Tensor, x: Tensor) -> Tensor:
    return torch.min(torch.max(adversary, x - EPS), x + EPS).clamp(0, 1)


def _uniform(x: Tensor, size: float = EPS) -> Tensor:
    return (x + torch.empty_like(x).uniform_(-size, size)).clamp(0, 1)


def _ascend(model: nn.Module, start: Tensor, x: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Sign steps on a loss of the images, in eval mode."""
    model.eval()
    adversary = start
    for _ in range(steps):
        leaf = adversary.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf)
        adversary = _ball(adversary + (SIZE if steps > 1 else 1.25 * EPS) * grad.sign(), x)
    model.train()
    return adversary.detach()


def _cross_entropy_at(model: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: F.cross_entropy(model(images), y, reduction="sum")


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True)


def _small_noise(x: Tensor) -> Tensor:
    return (x + 0.001 * torch.randn_like(x)).clamp(0, 1)


def _standard(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _label_smoothing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def _distillation(teacher: nn.Module) -> Step:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher(x) / 100.0).softmax(1)
        return F.cross_entropy(model(x) / 100.0, target)

    return step


def _fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(_ascend(model, _uniform(x), x, _cross_entropy_at(model, y), 1)), y)


def _n_fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    leaf = _uniform(x, 2 * EPS).requires_grad_()
    (grad,) = torch.autograd.grad(_cross_entropy_at(model, y)(leaf), leaf)
    model.train()
    return F.cross_entropy(model((leaf.detach() + EPS * grad.sign()).clamp(0, 1)), y)


def _pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(_ascend(model, _uniform(x), x, _cross_entropy_at(model, y), STEPS)), y)


def _trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        target = model(x)
    adversary = _ascend(model, _small_noise(x), x, lambda images: _divergence(target, model(images)), STEPS)
    clean = model(x)
    return F.cross_entropy(clean, y) + 6.0 * _divergence(clean, model(adversary)) / len(x)


def _mart(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    adversary = _ascend(model, _small_noise(x), x, _cross_entropy_at(model, y), STEPS)
    p, attacked = model(x).softmax(1), model(adversary)
    q = attacked.softmax(1)
    runner_up = q.scatter(1, y[:, None], 0).amax(1)
    boosted = F.cross_entropy(attacked, y) - (1.0001 - runner_up).log().mean()
    divergence = (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(1)
    return boosted + 5.0 * ((1.0 - p.gather(1, y[:, None]).squeeze(1)) * divergence).mean()


def _alp(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    adversary = _ascend(model, _uniform(x), x, _cross_entropy_at(model, y), STEPS)
    clean, attacked = model(x), model(adversary)
    return F.cross_entropy(attacked, y) + 0.5 * (clean - attacked).square().sum(1).mean()


def _vat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        target = model(x)
    noise = torch.randn_like(x)
    noise = noise / torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True)
    leaf = (x + noise).clamp(0, 1).requires_grad_()
    (grad,) = torch.autograd.grad(_divergence(target, model(leaf)), leaf)
    model.train()
    clean = model(x)
    moved = model((x + EPS * grad.sign()).clamp(0, 1))
    return F.cross_entropy(clean, y) + _divergence(clean.detach(), moved) / len(x)


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor, create_graph: bool = True) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=create_graph, retain_graph=True)
    return loss, grad


def _gradient_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss, grad = _input_gradient(model, x, y)
    return loss.mean() + EPS * grad.abs().flatten(1).sum(1).mean()


def _finite_difference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss, grad = _input_gradient(model, x, y, create_graph=False)
    moved = F.cross_entropy(model(x + 0.1 * EPS * grad.sign()), y)
    return loss.mean() + (moved - loss.mean()) / 0.1


def _projected(kind: str) -> Step:
    """One random projection of the Jacobian, on the sphere."""

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        logits = model(x)
        classes = logits.shape[1]
        cotangent = F.normalize(torch.randn_like(logits), dim=1)
        if kind == "centred":
            cotangent = cotangent - cotangent.mean(1, keepdim=True)
        if kind == "fisher":
            p = logits.softmax(1)
            cotangent = p.sqrt() * cotangent - p * (p.sqrt() * cotangent).sum(1, keepdim=True)
        (grad,) = torch.autograd.grad(logits, x, cotangent, create_graph=True)
        scale = 2.0 if kind == "centred" else classes
        return F.cross_entropy(logits, y) + 0.5 * scale * (EPS * grad).square().flatten(1).sum(1).mean()

    return step


def _local_linearity(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    center, tangent = (t.detach() for t in _input_gradient(model, x, y, create_graph=False))

    def gap(images: Tensor) -> Tensor:
        linear = ((images - x) * tangent).flatten(1).sum(1)
        return (F.cross_entropy(model(images), y, reduction="none") - center - linear).abs().sum()

    adversary = _ascend(model, _uniform(x), x, gap, 2)
    loss, grad = _input_gradient(model, x, y)
    linear = ((adversary - x) * grad).flatten(1).sum(1)
    moved = F.cross_entropy(model(adversary), y, reduction="none")
    return loss.mean() + 4.0 * ((moved - loss - linear).abs() + 0.75 * linear.abs()).mean()


def _cure(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss, grad = _input_gradient(model, x, y)
    _, moved = _input_gradient(model, x + EPS * grad.detach().sign(), y)
    return loss.mean() + 4.0 * (moved - grad).square().flatten(1).sum(1).mean()


def _grad_align(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    _, first = _input_gradient(model, x, y, create_graph=False)
    _, second = _input_gradient(model, _uniform(x), y)
    loss = F.cross_entropy(model((x + EPS * first.sign()).clamp(0, 1)), y)
    return loss + 0.2 * (1.0 - F.cosine_similarity(first.flatten(1), second.flatten(1))).mean()


def _awp(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The direction from a copy of the model, whose running statistics may change; then the loss at w + v."""
    adversary = _ascend(model, _uniform(x), x, _cross_entropy_at(model, y), STEPS)
    proxy = copy.deepcopy(model)
    weights = {name: w for name, w in proxy.named_parameters() if w.dim() > 1}
    grads = torch.autograd.grad(F.cross_entropy(proxy(adversary), y), list(weights.values()))
    own = dict(model.named_parameters())
    moved = {name: own[name] + 0.005 * w.norm() * g / g.norm() for (name, w), g in zip(weights.items(), grads)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (adversary,)), y)


def methods(model: nn.Module) -> list[Method]:
    """All methods, for a model like this one."""
    teacher = copy.deepcopy(model).eval()
    pgd = PGD(EPS, SIZE, steps=STEPS)
    return [
        Method("standard", 3, losses.CrossEntropy(), _standard),
        Method("label-smoothing", 3, losses.LabelSmoothing(0.1), _label_smoothing),
        Method("distillation", 4, losses.Distillation(teacher), _distillation(teacher)),
        Method("fgsm", 6, losses.AdversarialTraining(FGSM(EPS)), _fgsm),
        Method("n-fgsm", 6, losses.AdversarialTraining(NFGSM(EPS)), _n_fgsm),
        Method("pgd", 5 + 2 * STEPS, losses.AdversarialTraining(pgd), _pgd),
        Method("trades", 7 + 2 * STEPS, losses.TRADES(eps=EPS, steps=STEPS), _trades),
        Method("mart", 6 + 2 * STEPS, losses.MART(eps=EPS, steps=STEPS), _mart),
        Method("alp", 7 + 2 * STEPS, losses.ALP(pgd), _alp),
        Method("vat", 9, losses.VAT(1.0, EPS, norm="linf"), _vat),
        Method("gradient-penalty", 6, losses.GradientPenalty(1.0, 1.0, EPS), _gradient_penalty),
        Method(
            "gradient-penalty, finite differences",
            6,
            losses.GradientPenalty(1.0, 1.0, EPS, estimator="finite-difference"),
            _finite_difference,
        ),
        Method("jacobian, K = 1", 6, losses.JacobianPenalty(0.5, 1, EPS), _projected("plain")),
        Method("fisher, K = 1", 6, losses.FisherPenalty(0.5, 1, EPS), _projected("fisher")),
        Method("cross-lipschitz, K = 1", 6, losses.CrossLipschitz(0.5, 1, EPS), _projected("centred")),
        Method("llr", 15, losses.LocalLinearity(eps=EPS), _local_linearity),
        Method("cure", 12, losses.CURE(4.0, EPS), _cure),
        Method("gradalign", 11, losses.GradAlign(0.2, EPS), _grad_align),
        Method("pgd with awp", 9 + 2 * STEPS, losses.AWP(losses.AdversarialTraining(pgd), 0.005), _awp),
    ]
