"""What the tests run over: every sample of every operator, and helpers that know nothing of the operator."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import robustkern
from robustkern._dtypes import DTYPES
from robustkern.ops._pytorch_derivatives import DERIVATIVES
from robustkern.testing import Derivatives, assert_as_accurate_as_reference, cast, derivatives
from tests.samples import Sample, samples_of

OPS = [name for name in robustkern.ops.__all__ if name not in (*robustkern.ops.IN_PLACE, *DERIVATIVES)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A sample by name, so that it can be made for any device and dtype."""

    op: str
    name: str
    empty: bool
    elements: int
    orders: int = 2

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def sample(self, device: str, dtype: torch.dtype) -> Sample:
        return next(s for s in samples_of(self.op, device, dtype) if s.name == self.name)


CASES = [
    Case(op, sample.name, sample.empty, sample.inputs[0].numel(), sample.orders)
    for op in OPS
    for sample in samples_of(op)
]

over_all = pytest.mark.parametrize("case", CASES, ids=str)
over_filled = pytest.mark.parametrize("case", [c for c in CASES if not c.empty], ids=str)
# Cases whose kernels can be differentiated twice.
over_chains = pytest.mark.parametrize("case", [c for c in CASES if not c.empty and c.orders == 2], ids=str)
over_small_chains = pytest.mark.parametrize(
    "case", [c for c in CASES if not c.empty and c.elements <= 1000 and c.orders == 2], ids=str
)
over_small = pytest.mark.parametrize("case", [c for c in CASES if not c.empty and c.elements <= 1000], ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def in_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    """The same numbers in another dtype."""
    return dataclasses.replace(sample, inputs=cast(sample.inputs, dtype), options=cast(sample.options, dtype))


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """Normal random numbers in the layout of the tensor; the same values for every dtype and device."""
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.empty_like(tensor).copy_(values)


def cotangents(sample: Sample) -> tuple[Tensor, Tensor]:
    """Random cotangents of the value and of the gradient."""
    with torch.no_grad():
        value = sample(impl="reference")
    return random_like(value, 1), random_like(sample.inputs[0], 2)


def run(sample: Sample, grad: Tensor, u: Tensor, impl: str = "kernel", x: Tensor | None = None) -> Derivatives:
    """Value, gradient and double backward of a sample."""
    return derivatives(lambda v: sample(v, impl=impl), sample.inputs[0] if x is None else x, grad, u, sample.orders)


def assert_accurate(sample: Sample, grad: Tensor, u: Tensor, actual: Derivatives | None = None) -> None:
    """Checks the kernel's value and derivatives, or given ones, against the reference."""
    actual = run(sample, grad, u) if actual is None else actual
    exact = run(in_dtype(sample, torch.float64), *cast((grad, u)), "reference")
    if grad.dtype == torch.float64:
        eager = run(in_dtype(sample, torch.float32), *cast((grad, u), torch.float32), "reference")
    else:
        eager = run(sample, grad, u, "reference")
    for order in Derivatives._fields:
        trio = (getattr(d, order) for d in (actual, eager, exact))
        assert_as_accurate_as_reference(*trio, zero=order in sample.zero, what=f"{sample} {order}")


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Asserts that every bit is equal, NaN and signed zeros included."""
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a registered operator."""

    operator: Any  # torch._ops.OpOverload
    arguments: tuple[Any, ...]

    def __call__(self, **replaced: Any) -> tuple[Tensor, ...]:
        """Runs the call, with some arguments replaced; returns the results as a tuple."""
        arguments = [replaced.get(a.name, value) for a, value in zip(self.operator._schema.arguments, self.arguments)]
        result = self.operator(*arguments)
        return result if isinstance(result, tuple) else (result,)

    @property
    def name(self) -> str:
        return self.operator._schema.name.split("::")[1]

    @property
    def ends_chain(self) -> bool:
        """Whether differentiating it is refused."""
        once = ("margin_loss_backward", "random_cotangents_backward")
        return self.name.endswith("_double_backward") or self.name in once

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = zip((a.name for a in self.operator._schema.arguments), self.arguments)
        return {name: value for name, value in named if isinstance(value, Tensor)}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "robustkern":
            defaults = [a.default_value for a in func._schema.arguments[len(args) :]]
            arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in (*args, *defaults))
            call = Call(func, arguments)
            self.calls[call.name] = call
        return result


def recorded_calls(sample: Sample) -> dict[str, Call]:
    """The calls of registered operators that a sample and its two derivatives consist of, by operator."""
    with _Recorder() as recorder:
        run(sample, *cotangents(sample))
    return recorder.calls
