"""Steps as CUDA graphs: what a step launches is recorded once and then started as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustkern import _library
from robustkern._arguments import check_integer

__all__ = ["Graphed", "graphed"]


def graphed(
    step: Callable[..., Any],
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    generators: Sequence[torch.Generator] = (),
    warmup: int = 3,
    most: int = 8,
) -> Graphed:
    """step(*args) as a CUDA graph: the same kernels on the same numbers, launched by one call.

        @rk.graphed  # or rk.graphed(step, optimizer=optimizer)
        def step(x, y):
            optimizer.zero_grad()
            terms = loss(model, x, y)
            terms.backward(inputs=model.parameters())
            optimizer.step()
            return terms

    For steps whose kernels are shorter than the time it takes to launch them: a penalised step of small batches, or an
    attack, `rk.graphed(lambda x, y: attack(model, x, y))`.  The first `warmup` calls run the step as it is, on a stream
    of its own, so that every kernel is loaded and every buffer of the optimizer exists; the next one records it, which
    runs nothing, and from there on each call copies its tensors into those of the recording and replays.  Other
    shapes, dtypes, layouts, values of arguments that are no tensors, numbers among the optimizer's options, another
    grad mode or another autocast are another recording, with memory of its own.

    Where there is no CUDA device, a tensor is on another one, PyTorch refuses the recording, or there are `most`
    recordings already, the step runs as it is, and one warning says why.

    What is decided in Python is decided while recording: a step must do the same whenever it is called.  A learning
    rate that changes has to be a tensor on the device.  Whatever reads a number from the device (`.item()`,
    `bool(tensor)`) cannot be recorded.

    Args:
        step: a function of tensors on one CUDA device and of hashable values.
        optimizer: those that the step calls; checked, and their parameters' gradients are put back if recording fails.
        generators: those that the step draws from, besides the default one; a recording goes on from where they are.
        warmup: how many calls come first for each recording, at least 1.
        most: how many recordings there may be, at least 1.

    Returns:
        A function of the same arguments.  What it returns has no history; its tensors are those of the recording, and
        the next call writes into them: clone what is to be kept.

    Raises:
        TypeError: step is not callable, an optimizer or a generator is none.
        ValueError: an optimizer with `capturable=False`, or numbers that are not at least 1.

    >>> model, loss = nn.Linear(6, 3), rk.losses.GradientPenalty()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> def step(x, y):
    ...     optimizer.zero_grad()
    ...     terms = loss(model, x, y)
    ...     terms.backward(inputs=model.parameters())
    ...     optimizer.step()
    ...     return terms.total
    >>> fast = rk.graphed(step, optimizer=optimizer)
    >>> fast(torch.rand(4, 6), torch.tensor([0, 1, 2, 0])).shape  # on a CPU: the step as it is, and one warning
    torch.Size([])
    """
    return Graphed(step, optimizer, generators, warmup, most)


@dataclass
class _Recording:
    calls: int = 0  # that were made as they are
    graph: torch.cuda.CUDAGraph | None = None
    arguments: list[Any] = field(default_factory=list)
    result: Any = None


class Graphed:
    """A step that is recorded and replayed; see `graphed`.

    Attributes:
        recordings: How many there are.
        why_not: Why a call ran the step as it is, after warming up; None: none did.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
        most: int = 8,
    ) -> None:
        if not callable(step):
            raise TypeError(f"graphed: step must be callable, got {type(step).__name__}")
        self._step, self._name = step, getattr(step, "__name__", type(step).__name__)
        self._optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._generators = list(generators)
        self._warmup = check_integer("graphed", "warmup", warmup, 1)
        self._most = check_integer("graphed", "most", most, 1)
        for one in self._optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(f"graphed: optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
            if not all(group.get("capturable", True) for group in one.param_groups):
                kind = type(one).__name__
                raise ValueError(
                    f"graphed: optimizer must be capturable: make it with torch.optim.{kind}(..., capturable=True); "
                    "otherwise it counts its steps on the CPU, where a graph does not"
                )
        for generator in self._generators:
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"graphed: generators must be torch.Generators, got {type(generator).__name__}")
        self._recordings: dict[Any, _Recording] = {}
        self._refused: set[Any] = set()
        self.why_not: str | None = None

    @property
    def recordings(self) -> int:
        return sum(recording.graph is not None for recording in self._recordings.values())

    def __call__(self, *args: Any) -> Any:
        missing = _why_no_graph(args)
        if missing is not None:
            return self._as_it_is(args, missing)
        with torch.cuda.device(next(_tensors(args)).device):
            return self._replay(args)

    def _replay(self, args: tuple[Any, ...]) -> Any:
        """From a recording, which is made if it is not there yet."""
        key = self._key(args)
        if key in self._refused:
            return _without_history(self._step(*args))
        recording = self._recordings.get(key)
        if recording is None:
            if len(self._recordings) >= self._most:
                return self._as_it_is(args, f"{self._most} recordings are all that it was allowed")
            recording = self._recordings[key] = _Recording()
        if recording.graph is None and recording.calls < self._warmup:
            recording.calls += 1
            return self._warm_up(args)
        if recording.graph is None:
            try:
                self._record(recording, args)
            except Exception as error:
                del self._recordings[key]
                self._refused.add(key)
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                return self._as_it_is(args, f"PyTorch cannot record it ({first})")
        for kept, given in zip(recording.arguments, args):
            if isinstance(kept, Tensor):
                with torch.no_grad():
                    kept.copy_(given, non_blocking=True)
        assert recording.graph is not None
        recording.graph.replay()
        return recording.result

    def _as_it_is(self, args: tuple[Any, ...], why: str) -> Any:
        self.why_not = why
        _library.warn_once(f"graphed: {self._name} runs as it is, without a CUDA graph: {why}")
        return _without_history(self._step(*args))

    def _key(self, args: tuple[Any, ...]) -> Any:
        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
            return type(value), value

        options = tuple(
            tuple((name, value) for name, value in group.items() if isinstance(value, (int, float, tuple)))
            for one in self._optimizers
            for group in one.param_groups
        )
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda")
        try:
            key = tuple(map(of, args)), options, modes, torch.get_autocast_dtype("cuda")
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"graphed: {self._name} must be called with tensors and hashable values ({error})"
            ) from None
        return key

    def _warm_up(self, args: tuple[Any, ...]) -> Any:
        """The step on a stream of its own, as PyTorch asks for before it records a backward pass."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = _without_history(self._step(*args))
        current.wait_stream(stream)
        for tensor in _tensors(result):
            if tensor.is_cuda:
                tensor.record_stream(current)
        return result

    def _record(self, recording: _Recording, args: tuple[Any, ...]) -> None:
        recording.arguments = [_copy(value) if isinstance(value, Tensor) else value for value in args]
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Its memory is a pool of its own: what one recording keeps, another does not write into.
        with self._gradients_put_back_on_failure(), torch.cuda.graph(graph):
            result = _without_history(self._step(*recording.arguments))
        recording.result, recording.graph = result, graph

    @contextmanager
    def _gradients_put_back_on_failure(self) -> Iterator[None]:
        parameters = [p for one in self._optimizers for group in one.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        try:
            yield
        except BaseException:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            raise


def _why_no_graph(args: tuple[Any, ...]) -> str | None:
    """Why these arguments are nothing for a CUDA graph; None if they are."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    devices = {str(value.device) for value in args if isinstance(value, Tensor)}
    if not devices:
        return "it was called without tensors"
    if len(devices) > 1 or not devices.pop().startswith("cuda"):
        return "its tensors are not on one CUDA device"
    return "it is being recorded already" if torch.cuda.is_current_stream_capturing() else None


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor).copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def _without_history(value: Any) -> Any:
    """The same with every tensor detached, in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(_without_history, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_without_history, value))
    if isinstance(value, dict):
        return {name: _without_history(entry) for name, entry in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)
