"""A whole training step as one compiled function: what gradients of gradients need of torch.compile, in one call."""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from robustkern import _library
from robustkern.double_backward import fused_where_possible
from robustkern.terms import Terms

__all__ = ["CompiledStep", "compile"]

_numbers = count()


def compile(loss: Callable[..., Terms], model: nn.Module, **options: Any) -> CompiledStep:
    """Forward, loss and parameter gradients of a step with a penalty, compiled into one function.

        step = rk.compile(rk.losses.GradientPenalty(), model)
        for x, y in loader:
            optimizer.zero_grad()
            terms = step(x, y)  # fills .grad, as terms.backward(inputs=model.parameters()) does
            optimizer.step()

    A model that is compiled alone cannot be differentiated twice; the step can, if Dynamo traces torch.autograd.grad
    (`torch._dynamo.config.trace_autograd_ops`, PyTorch 2.13 has it) and x requires grad when it is passed in.  Both are
    seen to, for the time of a call; PyTorch's settings are left as they were.  Second derivatives are robustkern's,
    installed or not; those of activations are PyTorch's, which Inductor fuses with their neighbours.

    The first call takes from half a minute to some minutes, and says how many seconds it took.  A second batch size
    compiles once more, for all that follow (`dynamic=True`: the first call does).  Compile where a run has thousands of
    steps and the kernels are what it waits for; eager steps under `robustkern.install()` start at once, and are as fast
    for many networks.

    What cannot be compiled runs as it is, and one warning says why: an older PyTorch, a model with code that Dynamo
    refuses, and losses that look at numbers in between, as attacks do.

    Args:
        loss: A loss of `robustkern.losses`, or a function (model, x, y) -> Terms.
        model: A module that is not compiled itself.  If it is a DistributedDataParallel, the step of its module is
            compiled, and gradients are averaged after it (not inside `model.no_sync()`); buffers are not broadcast.
        **options: Of `torch.compile`, such as `dynamic`, `backend`, `mode`.

    Returns:
        A function (x, y) -> Terms, without graph.  Gradients are those of the parameters that require grad now, and are
        added to what `.grad` holds.

    Raises:
        TypeError: The model is no module, or is compiled; the loss cannot be called.

    Differentiability: none further.  Determinism: that of what Inductor makes.

    >>> model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> step = rk.compile(rk.losses.GradientPenalty(), model, backend="eager")  # traced, not compiled
    >>> terms = step(torch.rand(4, 6), torch.tensor([0, 1, 2, 0]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 6])
    """
    return CompiledStep(loss, model, options)


class CompiledStep:
    """A step that is compiled by its first call; see `compile`.

    Attributes:
        first_call_seconds: What the first call took; None before it.
        why_not: Why steps run as they are, uncompiled; None: they do not.
    """

    def __init__(self, loss: Callable[..., Terms], model: nn.Module, options: dict[str, Any]) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, torch._dynamo.OptimizedModule):
            raise TypeError(f"compile: model must be a module that is not compiled, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"compile: loss must be callable, got {type(loss).__name__}")
        self._given, self._loss = model, loss
        self._model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._parameters = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
        self._name = f"{getattr(loss, '__name__', type(loss).__name__)} of {type(self._model).__name__}"
        self._compiled = torch.compile(self._traced(), **{"fullgraph": True, **options})
        self._reuses_outputs = bool(options.get("mode") or options.get("options"))  # CUDA graphs do
        self.first_call_seconds: float | None = None
        self.why_not: str | None = None
        if not _traces_gradients():
            self._give_up(f"PyTorch {torch.__version__} cannot trace torch.autograd.grad")

    def __repr__(self) -> str:
        state = f"uncompiled: {self.why_not}" if self.why_not else "compiled by its first call"
        if self.first_call_seconds is not None and not self.why_not:
            state = f"compiled in {self.first_call_seconds:.0f} s"
        return f"CompiledStep({self._name}, {state})"

    def __call__(self, x: Tensor, y: Tensor) -> Terms:
        if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
            x = x.detach().requires_grad_()  # outside: what hangs on a leaf that is made inside cannot be returned
        terms, gradients = self._step(x, y) if self.why_not else self._compiled_step(x, y)
        self._accumulate(gradients)
        return terms

    def _step(self, x: Tensor, y: Tensor) -> tuple[Terms, tuple[Tensor | None, ...]]:
        terms = self._loss(self._model, x, y)
        gradients = torch.autograd.grad(terms.total, self._parameters, allow_unused=True)
        return terms.detach(), tuple(None if gradient is None else gradient.detach() for gradient in gradients)

    def _traced(self) -> Callable[[Tensor, Tensor], Any]:
        """The step with a code object of its own: Dynamo keeps a few compilations for each, then refuses."""

        def step(x: Tensor, y: Tensor) -> Any:
            terms, gradients = self._step(x, y)
            return (*terms, gradients)

        code = step.__code__.replace(co_name=f"robustkern_step_{next(_numbers)}")
        return types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)

    def _compiled_step(self, x: Tensor, y: Tensor) -> tuple[Terms, tuple[Tensor | None, ...]]:
        began = time.perf_counter()
        try:
            with _tracing_gradients(), fused_where_possible(getattr(self._loss, "impl", "auto")):
                *terms, gradients = self._compiled(x, y)
        except Exception as error:
            result = self._step(x, y)  # which raises what is wrong with the arguments
            self._give_up(f"PyTorch cannot compile it ({_first_line(error)})")
            return result
        if self.first_call_seconds is None:
            self.first_call_seconds = time.perf_counter() - began
            logging.getLogger("robustkern").warning("compile: %s took %.0f s", self._name, self.first_call_seconds)
        if self._reuses_outputs:
            gradients = tuple(None if gradient is None else gradient.clone() for gradient in gradients)
        return Terms(*terms), gradients

    def _accumulate(self, gradients: tuple[Tensor | None, ...]) -> None:
        found = [(p, gradient) for p, gradient in zip(self._parameters, gradients) if gradient is not None]
        for parameter, gradient in found:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if isinstance(self._given, DistributedDataParallel) and self._given.require_backward_grad_sync:
            _average([p.grad for p, _ in found if p.grad is not None], self._given.process_group)

    def _give_up(self, why: str) -> None:
        self.why_not = why
        _library.warn_once(f"compile: the step of {self._name} runs as it is, uncompiled: {why}")


def _average(gradients: list[Tensor], group: Any) -> None:
    """Over all processes, one message for each dtype."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        some = [gradient for gradient in gradients if gradient.dtype == dtype]
        whole = torch.cat([gradient.flatten() for gradient in some]) / dist.get_world_size(group)
        dist.all_reduce(whole, group=group)
        for gradient, part in zip(some, whole.split([gradient.numel() for gradient in some])):
            gradient.copy_(part.view_as(gradient))


def _traces_gradients() -> bool:
    """Whether this PyTorch can."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


@contextmanager
def _tracing_gradients() -> Iterator[None]:
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__
