"""Training steps: models, batches, and the ways of taking a step with a penalty on the input gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustkern as rk
from robustkern import models

from .harness import Work, differentiable_compilation

EPS = 8 / 255
PLAIN = "plain"
PROVIDERS = (PLAIN, "plain_compiled", "eager", "compile", "robustkern", "robustkern_compiled", "finite_differences")
PENALTIES: dict[str, tuple[float, bool]] = {"L1": (1.0, False), "L2": (2.0, False), "squared L2": (2.0, True)}

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Model, Tensor, Tensor], Tensor]  # (model, x, y) -> scalar


@dataclass(frozen=True)
class Spec:
    """A model, a batch and a penalty by name."""

    model: str
    batch: int
    shape: tuple[int, int, int]
    penalty: str = "L1"
    channels_last: bool = False
    autocast: bool = False  # bfloat16

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (self.batch, *self.shape)))
        options = [", channels_last"] * self.channels_last + [", bf16 autocast"] * self.autocast
        return f"{self.model}, {shape}{''.join(options)}"

    def __str__(self) -> str:
        return f"{self.name}, {self.penalty}"


def _mlp(shape: tuple[int, int, int]) -> nn.Module:
    features = shape[0] * shape[1] * shape[2]
    layers = [nn.Linear(features, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def _reduced(shape: tuple[int, int, int]) -> nn.Module:
    return models.PreActResNet(10, shape, (2, 2, 2, 2), widths=(16, 32, 64, 128))


MODELS: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {
    "mlp-gelu": _mlp,
    "small-cnn": lambda shape: models.create("small-cnn", 10, shape),
    "preact-resnet18 of width 16": _reduced,
    "preact-resnet18": lambda shape: models.create("preact-resnet18", 10, shape),
}


class Case:
    """A model with its batch; `work` is one step: forward, loss and the gradients of all parameters."""

    def __init__(self, spec: Spec, device: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.spec, self.device = spec, device
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        self.model = MODELS[spec.model](spec.shape).to(device=device, dtype=dtype, memory_format=layout).train()
        self.parameters = tuple(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(spec.batch, *spec.shape, generator=generator)
        self.x = x.to(device=device, dtype=dtype, memory_format=layout).requires_grad_()
        self.y = torch.randint(10, (spec.batch,), generator=generator).to(device)
        self.p, self.squared = PENALTIES[spec.penalty]

    def work(self, provider: str, backend: str = "inductor") -> Work:
        """One step that leaves the gradients in the parameters' .grad, or returns them if compiled."""
        if provider.endswith("compile") or provider.endswith("compiled"):
            return self._compiled(self._loss(provider), backend)
        loss = self._loss(provider)

        def step() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            with self._precision():
                total = loss(self.model, self.x, self.y)
            total.backward(inputs=self.parameters)

        return step

    def gradient(self, provider: str, backend: str = "inductor") -> Tensor:
        """All parameters' gradients in one vector, for comparison."""
        grads = self.work(provider, backend)()
        grads = tuple(p.grad for p in self.parameters) if grads is None else grads
        return torch.cat([grad.detach().flatten() for grad in grads])  # type: ignore[union-attr]

    def _compiled(self, loss: Loss, backend: str) -> Work:
        """The whole step, input gradient and parameter gradients included, as one compiled function."""

        def traced(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            with self._precision():
                total = loss(self.model, x, y)
            grads = torch.autograd.grad(total, self.parameters)
            return tuple(grad.detach() for grad in grads)

        compiled = torch.compile(traced, backend=backend, dynamic=False, fullgraph=True)

        def step() -> object:
            with differentiable_compilation():
                return compiled(self.x, self.y)

        return step

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16) if self.spec.autocast else nullcontext()

    def _loss(self, provider: str) -> Loss:
        if provider.startswith(PLAIN):
            return lambda model, x, y: F.cross_entropy(model(x.detach()), y)
        if provider.startswith("robustkern"):
            penalty = rk.losses.GradientPenalty(1.0, self.p, EPS, squared=self.squared, impl="kernel")
            return lambda model, x, y: penalty(model, x, y).total
        return self._finite_differences if provider == "finite_differences" else self._stock

    def _stock(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """What a user of PyTorch writes."""
        loss = F.cross_entropy(model(x), y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        if self.squared:
            norm = (EPS * grad).flatten(1).square().sum(1)
        else:
            norm = torch.linalg.vector_norm((EPS * grad).flatten(1), self.p, dim=1)
        return loss.mean() + norm.mean()

    def _finite_differences(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """||g||_p = <g, d> along the steepest ascent d, and <g, d> = (loss(x + h d) - loss(x)) / h up to O(h)."""
        loss = F.cross_entropy(model(x), y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        dims = tuple(range(1, x.dim()))
        direction = grad.sign() if self.p == 1.0 else grad / torch.linalg.vector_norm(grad, 2, dims, keepdim=True)
        length = 1e-2 / torch.linalg.vector_norm(direction, 2, dims, keepdim=True)
        moved = F.cross_entropy(model((x + length * direction).detach()), y, reduction="none")
        norm = EPS * (moved - loss) / length.flatten()
        return loss.mean() + (norm.square() if self.squared else norm).mean()


def specs(size: str, device: str) -> list[Spec]:
    """The steps of one size: "tiny" for tests, "full" for figures."""
    if size == "tiny":
        return [Spec("small-cnn", 4, (1, 8, 8), "L2")]
    cifar = (3, 32, 32)
    if device == "cuda":
        return [
            Spec("preact-resnet18", 256, cifar),
            Spec("preact-resnet18", 256, cifar, channels_last=True, autocast=True),
            Spec("small-cnn", 1024, cifar),
            Spec("preact-resnet18", 256, cifar, "L2"),
            Spec("mlp-gelu", 1024, cifar, "squared L2"),
        ]
    return [
        Spec("small-cnn", 128, (1, 8, 8)),
        Spec("small-cnn", 128, (1, 28, 28)),
        Spec("small-cnn", 128, (1, 28, 28), "L2"),
        Spec("mlp-gelu", 128, cifar, "squared L2"),
        Spec("preact-resnet18 of width 16", 64, cifar),
        Spec("preact-resnet18 of width 16", 64, cifar, "L2"),
        Spec("preact-resnet18 of width 16", 64, cifar, channels_last=True),
    ]
