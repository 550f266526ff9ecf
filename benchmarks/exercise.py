"""Runs every operator's samples on a device: what compute-sanitizer watches (python -m benchmarks.exercise).

With --check every result is held to the reference in float64, which runs on the CPU.  The samples of all operators take
turns, so that whoever stops early, after --seconds, has seen some of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import robustkern
from robustkern._dtypes import DTYPES
from robustkern.ops._pytorch_derivatives import DERIVATIVES
from robustkern.testing import Derivatives, assert_as_accurate_as_reference, cast, derivatives
from tests.samples import DerivativeSample, Sample, samples_of

from .harness import reason, synchronize

OPERATORS = tuple(dict.fromkeys((*robustkern.ops.__all__, *DERIVATIVES)))
Result = tuple[Tensor, ...]
Call = tuple[str, Callable[[bool], None]]  # its name, and what runs it, checked or not


def calls(operator: str, device: str, dtype: torch.dtype) -> Iterator[Call]:
    """Every sample of an operator."""
    kind = (
        _derivative
        if operator in DERIVATIVES
        else _in_place
        if operator in robustkern.ops.IN_PLACE
        else _differentiable
    )
    for sample in samples_of(operator, device, dtype):
        label = f"{operator} ({sample.name}) {str(dtype).removeprefix('torch.')}"
        yield label, lambda check, sample=sample: kind(operator, sample, dtype, check)  # type: ignore[misc]


def _in_turns(devices_calls: list[Iterator[Call]]) -> Iterator[Call]:
    for round_of_calls in itertools.zip_longest(*devices_calls):
        yield from (call for call in round_of_calls if call is not None)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_to_cpu(item) for item in value)
    return {key: _to_cpu(item) for key, item in value.items()} if isinstance(value, dict) else value


def _compare(label: str, names: tuple[str, ...], actual: Result, eager: Result, exact: Result, zero: Any) -> None:
    for i, (name, a, r, e) in enumerate(zip(names, actual, eager, exact, strict=True)):
        rounding = torch.float32 if a.dtype == torch.float64 else a.dtype
        assert_as_accurate_as_reference(
            a.cpu(), r.cpu().to(rounding), e, zero=i in zero or name in zero, what=f"{label} {name}"
        )


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """What the reference that sets the bound runs in: float64 results count in float32's units."""
    return torch.float32 if dtype == torch.float64 else dtype


def _derivative(operator: str, sample: DerivativeSample, dtype: torch.dtype, check: bool) -> None:
    entry = DERIVATIVES[operator]
    actual = entry.operator(*sample.arguments.values())
    if check:
        arguments = sample.arguments if dtype != torch.float64 else cast(sample.arguments, torch.float32)
        exact = entry.reference(*cast(_to_cpu(sample.arguments)).values())
        _compare(operator, entry.outputs, actual, entry.reference(*arguments.values()), exact, sample.zero)


def _differentiable(operator: str, sample: Sample, dtype: torch.dtype, check: bool) -> None:
    x = sample.inputs[0]
    with torch.no_grad():
        value = sample(impl="reference")
    generator = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))

    grad, u = like(value), like(x)

    def run(of: Sample, grad: Tensor, u: Tensor, impl: str) -> Derivatives:
        return derivatives(lambda v: of(v, impl=impl), of.inputs[0], grad, u, of.orders)

    def moved(dtype: torch.dtype, cpu: bool) -> tuple[Sample, Tensor, Tensor]:
        inputs, options, cotangents = (cast(v, dtype) for v in (sample.inputs, sample.options, (grad, u)))
        if cpu:
            inputs, options, cotangents = _to_cpu((inputs, options, cotangents))
        return dataclasses.replace(sample, inputs=inputs, options=options), *cotangents

    actual = run(sample, grad, u, "kernel")
    if check and not sample.empty:
        eager, exact = run(*moved(_narrow(dtype), False), "reference"), run(*moved(torch.float64, True), "reference")
        _compare(f"{operator} ({sample.name})", Derivatives._fields, actual, eager, exact, sample.zero)


def _in_place(operator: str, sample: Sample, dtype: torch.dtype, check: bool) -> None:
    def fresh(dtype: torch.dtype, cpu: bool = False) -> Sample:
        inputs = tuple(torch.empty_like(t, dtype=dtype).copy_(t) for t in sample.inputs)
        options = cast(sample.options, dtype)
        return dataclasses.replace(
            sample, inputs=_to_cpu(inputs) if cpu else inputs, options=_to_cpu(options) if cpu else options
        )

    actual = fresh(dtype)(impl="kernel")
    if not check or sample.empty:
        return
    if dtype.itemsize == 2:  # a rounded number may fall to either side
        eager = fresh(dtype)(impl="reference")
        steps = (actual.view(torch.int16).int() - eager.view(torch.int16).int()).abs()
        assert steps.max() <= 1, f"{operator} ({sample.name}): {int(steps.max())} steps of {dtype} from the reference"
        return
    exact = fresh(torch.float64, cpu=True)(impl="reference")
    eager = fresh(_narrow(dtype))(impl="reference")
    _compare(f"{operator} ({sample.name})", ("result",), (actual,), (eager,), (exact,), ())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true", help="compare every result with the reference")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=[str(d)[6:] for d in DTYPES])
    parser.add_argument("--operators", nargs="+", default=OPERATORS, choices=OPERATORS)
    options = parser.parse_args(arguments)
    dtypes = [getattr(torch, name) for name in options.dtypes]
    todo = _in_turns([calls(op, options.device, dtype) for op in options.operators for dtype in dtypes])
    began, ran, failed = time.monotonic(), Counter[str](), Counter[str]()
    finished = True
    for label, call in todo:
        operator = label.split(" ")[0]
        ran[operator] += 1
        try:
            call(options.check)
            synchronize(options.device)
        except Exception as error:
            failed[operator] += 1
            if failed[operator] <= 3:
                print(f"FAILED {label}: {reason(error)}", flush=True)
        if time.monotonic() - began > options.seconds:
            finished = False
            break
    for operator in options.operators:
        print(f"  {operator:42s} {ran[operator]:5d} samples, {failed[operator]} failed")
    verb = "checked" if options.check else "ran"
    rest = "" if finished else f", stopped after {options.seconds:.0f} s"
    print(f"{verb} {ran.total()} samples of {len(ran)} operators, {failed.total()} failed{rest}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
