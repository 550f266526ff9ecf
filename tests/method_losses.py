"""Every published loss with what it should compute: a formula in stock PyTorch, and its effect on BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern import Draw, losses
from robustkern.attacks import FGSM, NFGSM, PGD
from robustkern.losses.attack_loss import AttackLoss
from robustkern.sharding import Shard

CLASSES, EPS, WEIGHT = 5, 0.1, 0.7


def network(device: str, dtype: torch.dtype = torch.float64, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2), nn.Softplus(), nn.Flatten()]
    if batch_norm:
        layers.insert(1, nn.BatchNorm2d(4))
    model = nn.Sequential(*layers, nn.Linear(16, CLASSES)).to(device, dtype)
    with torch.no_grad():  # steep enough that smoothness matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 3
    return model


def batch(device: str, dtype: torch.dtype = torch.float64, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(size, 3, 6, 6, generator=generator, dtype=torch.float64).to(device, dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator).to(device)


def teacher(device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(8)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, CLASSES)).to(device, dtype)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="none", log_target=True).sum(1)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="none")
    return loss, torch.autograd.grad(loss.sum(), x, create_graph=True)[0]


def _adversarial(model, x, y, found, loss, draw):
    clean = F.cross_entropy(model(x), y)
    return clean, F.cross_entropy(model(found), y) - clean


def _trades(model, x, y, found, loss, draw):
    return F.cross_entropy(model(x), y), kl(model(x), model(found)).mean()


def _mart(model, x, y, found, loss, draw):
    p, q = model(x).softmax(1), model(found).softmax(1)
    own = F.one_hot(y, CLASSES).bool()
    runner_up = q.masked_fill(own, 0).max(1).values
    boosted = -q[own].log() - (1 - runner_up).log()
    return boosted.mean(), ((1 - p[own]) * (p * (p.log() - q.log())).sum(1)).mean()


def _alp(model, x, y, found, loss, draw):
    return F.cross_entropy(model(found), y), ((model(x) - model(found)) ** 2).sum() / len(x)


def _vat(model, x, y, found, loss, draw):
    return F.cross_entropy(model(x), y), kl(model(x).detach(), model(found)).mean()


def _local_linearity(model, x, y, found, loss, draw):
    value, grad = input_gradient(model, x, y)
    linear = ((found - x) * grad).sum((1, 2, 3))
    moved = F.cross_entropy(model(found), y, reduction="none")
    return value.mean(), ((moved - value - linear).abs() + 0.75 * linear.abs()).mean()


def _cure(model, x, y, found, loss, draw):
    value, grad = input_gradient(model, x, y)
    _, moved = input_gradient(model, (x + EPS * grad.sign()).detach(), y)
    return value.mean(), ((moved - grad) ** 2).sum() / len(x)


def _grad_align(model, x, y, found, loss, draw):
    from robustkern.ops import attack_start

    image, first, _ = found
    probe = attack_start(x, eps=EPS, generator=draw.generator, samples=draw.samples(x))
    _, second = input_gradient(model, probe, y)
    cosine = F.cosine_similarity(first.flatten(1), second.flatten(1))
    return F.cross_entropy(model(image), y), (1 - cosine).mean()


def _label_smoothing(model, x, y, found, loss, draw):
    log_p = model(x).log_softmax(1)
    return (1 - WEIGHT) * F.nll_loss(log_p, y), -log_p.mean()


def _distillation(model, x, y, found, loss, draw):
    with torch.no_grad():
        target = (loss.teacher.to(x.device).eval()(x) / 3.0).softmax(1)
    return -(target * (model(x) / 3.0).log_softmax(1)).sum(1).mean(), torch.zeros((), dtype=x.dtype, device=x.device)


def _finite_difference(model, x, y, found, loss, draw):
    value, grad = input_gradient(model, x, y)
    moved = F.cross_entropy(model((x + 0.1 * EPS * grad.sign()).detach()), y, reduction="none")
    return value.mean(), (moved - value).mean() / 0.1


@dataclass(frozen=True)
class Case:
    """A loss, its formula given what its attack found, its forward passes and BatchNorm updates in one call."""

    name: str
    make: Callable[..., Any]
    formula: Callable[..., tuple[Tensor, Tensor]]
    forwards: int
    updates: int

    def __str__(self) -> str:
        return self.name


def _fgsm(impl="auto", weight=WEIGHT):
    return losses.AdversarialTraining(FGSM(EPS), weight, impl=impl)


def _three(kind):
    return lambda impl="auto", weight=WEIGHT: kind(weight, eps=EPS, steps=3, impl=impl)


ATTACKED = [
    Case("FGSM", _fgsm, _adversarial, 3, 1),
    Case(
        "N-FGSM",
        lambda impl="auto", weight=WEIGHT: losses.AdversarialTraining(NFGSM(EPS), weight, impl=impl),
        _adversarial,
        3,
        1,
    ),
    Case(
        "PGD",
        lambda impl="auto", weight=WEIGHT: losses.AdversarialTraining(PGD(EPS, steps=3), weight, impl=impl),
        _adversarial,
        6,
        1,
    ),
    Case("TRADES", _three(losses.TRADES), _trades, 6, 2),
    Case("MART", _three(losses.MART), _mart, 5, 2),
    Case("ALP", lambda impl="auto", weight=WEIGHT: losses.ALP(PGD(EPS, steps=3), weight, impl), _alp, 6, 2),
    Case("VAT", lambda impl="auto", weight=WEIGHT: losses.VAT(weight, EPS, norm="linf", impl=impl), _vat, 4, 1),
    Case("LocalLinearity", _three(losses.LocalLinearity), _local_linearity, 6, 1),
    Case("GradAlign", lambda impl="auto", weight=WEIGHT: losses.GradAlign(weight, EPS, impl=impl), _grad_align, 3, 1),
]
PLAIN = [
    Case(
        "LabelSmoothing",
        lambda impl="auto", weight=WEIGHT: losses.LabelSmoothing(weight, impl=impl),
        _label_smoothing,
        1,
        1,
    ),
    Case(
        "Distillation",
        lambda impl="auto", weight=WEIGHT: losses.Distillation(teacher(), 3.0, impl=impl),
        _distillation,
        1,
        1,
    ),
    Case("CURE", lambda impl="auto", weight=WEIGHT: losses.CURE(weight, EPS, impl=impl), _cure, 2, 1),
    Case(
        "finite-difference",
        lambda impl="auto", weight=WEIGHT: losses.GradientPenalty(
            weight, 1.0, EPS, impl=impl, estimator="finite-difference"
        ),
        _finite_difference,
        2,
        1,
    ),
]

over_attacked = pytest.mark.parametrize("case", ATTACKED, ids=str)
over_losses = pytest.mark.parametrize("case", ATTACKED + PLAIN, ids=str)


def prepared(case: Case, device: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The loss, ready for tensors of that kind."""
    loss = case.make(**options)
    if hasattr(loss, "teacher"):
        loss.teacher.to(dtype)
    return loss


def drawn(device: str, seed: int = 7, shard: Shard | None = None) -> Draw:
    """The same random numbers each time it is made."""
    return Draw(torch.Generator(device).manual_seed(seed), shard=shard)


def found_by(loss: Any, model: nn.Module, x: Tensor, y: Tensor, draw: Draw) -> Any:
    return loss.adversaries(model, x, y, draw) if isinstance(loss, AttackLoss) else None


def terms_of(loss: Any, model: nn.Module, x: Tensor, y: Tensor, found: Any, draw: Draw) -> Any:
    return loss(model, x, y, draw) if found is None else loss.terms(model, x, found, y, draw)


def gradients(total, model):
    return torch.autograd.grad(
        total, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
