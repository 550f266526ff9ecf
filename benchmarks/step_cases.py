"""Training steps: models, batches, and the ways of taking a step with a penalty on the input gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk

from . import jax_steps
from .harness import differentiable_compilation
from .step_models import ATTENTION, MODELS, Shape, available

PLAIN, PLAIN_INSTALLED = "plain", "plain_installed"
STOCK, INSTALLED, FINITE_DIFFERENCES = "eager", "installed", "finite_differences"
SAVING = "installed_save_memory"
FORWARD = "forward_over_reverse"
COMPILED = ("compile", "installed_compile")
GRAPHED = "installed_graph"
JAX = "jax"
PROVIDERS = (PLAIN, PLAIN_INSTALLED, STOCK, FORWARD, INSTALLED, SAVING, GRAPHED, FINITE_DIFFERENCES, *COMPILED, JAX)
PENALTIES: dict[str, tuple[float, bool]] = {"L1": (1.0, False), "L2": (2.0, False), "squared L2": (2.0, True)}

Gradients = tuple[Tensor, ...]
Step = Callable[[], Gradients]
Loss = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> scalar


@dataclass(frozen=True)
class Spec:
    """A model, a batch and a penalty by name."""

    model: str
    batch: int
    shape: Shape = (3, 32, 32)
    penalty: str = "squared L2"
    channels_last: bool = False
    autocast: bool = False  # bfloat16
    compiled: bool = True  # whether there are columns of torch.compile, which take a minute each
    jax: bool = True  # whether there is a column of JAX, which compiles for as long
    graphed: bool = False  # whether there is a column of the step as one CUDA graph

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (self.batch, *self.shape)))
        options = [", channels_last"] * self.channels_last + [", bf16 autocast"] * self.autocast
        return f"{self.model}, {shape}{''.join(options)}"

    @property
    def providers(self) -> tuple[str, ...]:
        left_out = (() if self.compiled else COMPILED) + (() if self.graphed else (GRAPHED,))
        if self.autocast or not self.jax:
            left_out += (JAX,)
        if self.autocast or (self.channels_last and "GroupNorm" in self.model):
            left_out += (FORWARD,)  # PyTorch's GroupNorm moves forwards in contiguous images only
        return tuple(p for p in PROVIDERS if p not in left_out)

    def __str__(self) -> str:
        return f"{self.name}, {self.penalty}"


class Case:
    """A model with its batch; `step` is one of: forward, loss and the gradients of all parameters."""

    def __init__(self, spec: Spec, device: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.spec, self.device = spec, device
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        self.model: nn.Module = MODELS[spec.model](spec.shape).to(device=device, dtype=dtype, memory_format=layout)
        self.model.train()
        self.parameters = tuple(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(spec.batch, *spec.shape, generator=generator)
        self.x = x.to(device=device, dtype=dtype, memory_format=layout).requires_grad_()
        self.y = torch.randint(10, (spec.batch,), generator=generator).to(device)
        self.p, self.squared = PENALTIES[spec.penalty]
        self.weight = 1.0
        self.weight = self._balance()

    def step(self, provider: str, backend: str = "inductor") -> Step:
        """One training step of a column: returns the parameters' gradients and leaves nothing behind."""
        if provider in (FINITE_DIFFERENCES, FORWARD, JAX):
            return self._by_other_means(provider)
        loss = self._losses()[provider]
        if provider in COMPILED:
            return self._compiled(provider, loss, backend)
        if provider == GRAPHED:
            return self._graphed()

        def step() -> Gradients:
            with self._conditions(provider):
                with self._precision():
                    total = loss(self.x, self.y)
                total.backward(inputs=self.parameters)
            return self._take_gradients()

        return step

    def gradient(self, provider: str, backend: str = "inductor") -> Tensor:
        """All parameters' gradients in one vector, for comparison."""
        return flat(self.step(provider, backend)())

    @contextmanager
    def _conditions(self, provider: str) -> Iterator[None]:
        """The state of the process that a column is about: robustkern installed or not, and which attention."""
        installed = "installed" in provider
        stock_penalty = not installed and provider not in (PLAIN, FINITE_DIFFERENCES, JAX)
        attention = sdpa_kernel(SDPBackend.MATH) if stock_penalty and self.spec.model in ATTENTION else nullcontext()
        if rk.is_installed():
            raise RuntimeError("robustkern is installed already: the stock columns would not be stock")
        if installed:
            rk.install(save_memory=provider == SAVING)
        try:
            with attention:
                yield
        finally:
            if installed:
                rk.uninstall()

    def _compiled(self, provider: str, loss: Loss, backend: str) -> Step:
        """The whole step, input gradient and parameter gradients included, as one compiled function."""

        def traced(x: Tensor, y: Tensor) -> Gradients:
            with self._precision():
                total = loss(x, y)
            grads = torch.autograd.grad(total, self.parameters, allow_unused=True)
            return tuple(
                torch.zeros_like(p) if grad is None else grad.detach() for p, grad in zip(self.parameters, grads)
            )

        # Dynamo caches compiled code by the code object, which all columns would share.
        traced.__code__ = traced.__code__.replace(co_name=f"step_{next(_steps)}_{provider}")
        compiled = torch.compile(traced, backend=backend, dynamic=False, fullgraph=True)

        def step() -> Gradients:
            with self._conditions(provider), differentiable_compilation():
                return compiled(self.x, self.y)

        return step

    def _graphed(self) -> Step:
        """The step of "installed", captured once and replayed."""
        step, stream, graph = self.step(INSTALLED), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            gradients = step()

        def replay() -> Gradients:
            graph.replay()
            return gradients

        return replay

    def _take_gradients(self) -> Gradients:
        gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16) if self.spec.autocast else nullcontext()

    def _losses(self) -> dict[str, Loss]:
        plain, penalised = self._plain, self._penalised
        return {
            PLAIN: plain, PLAIN_INSTALLED: plain, STOCK: penalised, INSTALLED: penalised, SAVING: penalised,
            GRAPHED: penalised, **dict.fromkeys(COMPILED, penalised),
        }  # fmt: skip

    def _plain(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x.detach()), y)

    def _penalised(self, x: Tensor, y: Tensor) -> Tensor:
        """What a user of PyTorch writes."""
        loss = F.cross_entropy(self.model(x), y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        if self.squared:
            norm = grad.flatten(1).square().sum(1)
        else:
            norm = torch.linalg.vector_norm(grad.flatten(1), self.p, dim=1)
        return loss.mean() + self.weight * norm.mean()

    def _by_other_means(self, provider: str) -> Step:
        """Steps that do not differentiate one graph twice."""
        if provider == JAX:
            return jax_steps.penalised_step(self.model, self.x, self.y, self.p, self.squared, self.weight)
        step = self._finite_differences if provider == FINITE_DIFFERENCES else self._forward_over_reverse

        def conditioned() -> Gradients:
            with self._conditions(provider):
                return step()

        return conditioned

    def _direction(self, grad: Tensor) -> Tensor:
        """v, the derivative of the penalty in the gradient g of a sample's loss.

        The gradient of <g, v> in the parameters, v held fixed, is that of the penalty, which a step needs.
        """
        if self.squared:
            return 2 * grad
        return (
            grad.sign() if self.p == 1.0 else grad / torch.linalg.vector_norm(grad.flatten(1), 2, 1).view(-1, 1, 1, 1)
        )

    def _finite_differences(self) -> Gradients:
        """<g, v> = (loss(x + h v) - loss(x)) / h up to O(h), in two plain steps, one graph after the other.

        This holds even for models that mix the samples of a batch, since h is the same for all.
        """
        with self._precision():
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward(inputs=(self.x, *self.parameters))
        assert self.x.grad is not None
        v = self._direction(len(self.x) * self.x.grad)
        self.x.grad = None
        h = 1e-2 / torch.linalg.vector_norm(v.flatten(1), 2, 1).mean()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad *= 1 - self.weight / h
        del loss
        with self._precision():
            moved = F.cross_entropy(self.model((self.x + h * v).detach()), self.y)
        (self.weight / h * moved).backward(inputs=self.parameters)
        return self._take_gradients()

    def _forward_over_reverse(self) -> Gradients:
        """The derivative of the parameters' gradient along v, by torch.func.jvp of torch.func.grad."""
        names = [name for name, _ in self.model.named_parameters()]

        def loss(parameters: Gradients, x: Tensor) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            logits = torch.func.functional_call(self.model, (dict(zip(names, parameters)), buffers), (x,))
            return F.cross_entropy(logits, self.y)

        parameters, x = tuple(p.detach() for p in self.parameters), self.x.detach()
        v = self._direction(len(x) * torch.func.grad(loss, argnums=1)(parameters, x))
        gradients, along = torch.func.jvp(lambda x: torch.func.grad(loss)(parameters, x), (x,), (v,))
        return tuple(gradient + self.weight * turn for gradient, turn in zip(gradients, along))

    def _balance(self) -> float:
        """The weight that makes the penalty as large as the loss, to one digit: neither hides an error in the other."""
        with self._conditions(STOCK):
            loss = F.cross_entropy(self.model(self.x), self.y, reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), self.x)
        norm = torch.linalg.vector_norm(grad.flatten(1).double(), self.p, dim=1)
        ratio = loss.detach().double().mean() / (norm.square() if self.squared else norm).mean()
        return float(f"{float(ratio):.0e}")


_steps = count()


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.detach().flatten() for gradient in gradients])


def exact(spec: Spec, device: str, provider: str) -> Tensor:
    """The gradient in float64, by stock PyTorch."""
    spec = replace(spec, autocast=False, channels_last=False)  # the layout in which stock PyTorch is faster
    return Case(spec, device, torch.float64).gradient(provider)


def specs(size: str, device: str) -> list[Spec]:
    """The steps of one size: "tiny" for tests, "full" for figures; those whose package is installed."""
    return [spec for spec in _specs(size, device) if available(spec.model)]


def _specs(size: str, device: str) -> list[Spec]:
    if size == "tiny":
        shape = (3, 8, 8)
        cases = [
            Spec("tiny PreAct-ResNet, BatchNorm", 4, shape),
            Spec("tiny PreAct-ResNet, GroupNorm", 4, shape, "L1", channels_last=True),
            Spec("tiny ConvNeXt", 4, shape, "L2", channels_last=True),
            Spec("tiny ViT", 4, shape),
            Spec("MLP with GELU", 4, shape, compiled=False),
        ]
        return [replace(spec, jax=False) for spec in cases]
    if device == "cuda":
        resnet, of_size_b = "PreAct-ResNet-18, BatchNorm", "ViT-B/16"
        cases = [
            Spec(resnet, 128),
            Spec(resnet, 128, channels_last=True, autocast=True),
            Spec(of_size_b, 64, (3, 224, 224), autocast=True),
            Spec(resnet, 256, compiled=False),
            Spec(resnet, 256, channels_last=True, autocast=True, compiled=False),
            Spec("ConvNeXt blocks", 256, channels_last=True),
            Spec("ViT", 256),
            Spec("conv-BatchNorm-ReLU of PyTorch issue 3076", 512),
            Spec("PreAct-ResNet-18 of PyTorch issue 7714", 128),
            Spec("MLP with GELU", 1024, penalty="L1"),
        ]
        return [replace(spec, graphed=True, jax=False) for spec in cases]
    batch_norm, group_norm = (f"PreAct-ResNet-18 of width 32, {norm}Norm" for norm in ("Batch", "Group"))
    return [
        Spec(batch_norm, 48),
        Spec(batch_norm, 48, channels_last=True),
        Spec(group_norm, 48),
        Spec(group_norm, 48, channels_last=True),
        Spec("ConvNeXt blocks", 48),
        Spec("ConvNeXt blocks", 48, channels_last=True),
        Spec("ViT", 48),
        Spec("conv-BatchNorm-ReLU of PyTorch issue 3076", 48),
        Spec("PreAct-ResNet-18 of PyTorch issue 7714", 16),
        Spec("pytorchcv PreResNet-20", 64),
        Spec("x-transformers ViT", 48),
    ]
