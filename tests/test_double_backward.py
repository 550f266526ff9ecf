"""Every second derivative of PyTorch's own operators: the kernel against the reference, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustkern._dtypes import DTYPES
from robustkern.ops._pytorch_derivatives import DERIVATIVES, Derivative
from robustkern.testing import assert_as_accurate_as_reference, cast
from tests.cases import assert_same_bits
from tests.samples import DerivativeSample, samples_of

SAMPLES = [(op, sample.name) for op in DERIVATIVES for sample in samples_of(op)]
over_samples = pytest.mark.parametrize(("op", "name"), SAMPLES, ids=lambda v: v.replace(" ", "_"))
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
over_operators = pytest.mark.parametrize("op", DERIVATIVES)
over_ends = pytest.mark.parametrize("op", [op for op, entry in DERIVATIVES.items() if entry.ends_chain])


def sample_of(op: str, name: str, device: str, dtype: torch.dtype) -> tuple[Derivative, DerivativeSample]:
    return DERIVATIVES[op], next(s for s in samples_of(op, device, dtype) if s.name == name)


def first_of(op: str, device: str, dtype: torch.dtype = torch.float64) -> tuple[Derivative, DerivativeSample]:
    return DERIVATIVES[op], next(samples_of(op, device, dtype))


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.every_value
@over_dtypes
@over_samples
def test_as_accurate_as_the_reference(op, name, dtype, device):
    entry, sample = sample_of(op, name, device, dtype)
    actual = entry.operator(*sample.arguments.values())
    exact = entry.reference(*cast(sample.arguments).values())
    eager_dtype = torch.float32 if dtype == torch.float64 else None
    arguments = sample.arguments if eager_dtype is None else cast(sample.arguments, eager_dtype)
    eager = entry.reference(*arguments.values())
    for i, (what, a, r, e) in enumerate(zip(entry.outputs, actual, eager, exact, strict=True)):
        label = f"{op}({name}) {what}"
        assert_as_accurate_as_reference(a, r.to(torch.float32 if dtype == torch.float64 else a.dtype), e,
                                        zero=i in sample.zero, what=label)  # fmt: skip


@over_samples
def test_every_run_gives_the_same_bits(op, name, device):
    entry, sample = sample_of(op, name, device, torch.float32)
    expected = entry.operator(*sample.arguments.values())
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_same_bits(entry.operator(*sample.arguments.values()), expected)
    finally:
        torch.set_num_threads(threads)


@over_operators
def test_strides_do_not_matter(op, device):
    """Arguments with gaps, and transposed in memory, give the bits of dense ones."""
    entry, sample = first_of(op, device)
    expected = entry.operator(*sample.arguments.values())
    gapped = dict(sample.arguments)
    for name, value in tensors(sample.arguments).items():
        wide = value.new_empty([*value.shape, 2])
        wide[..., 1] = float("nan")
        wide[..., 0] = value
        gapped[name] = wide[..., 0]
    assert_same_bits(tuple(t.contiguous() for t in entry.operator(*gapped.values())), expected)


@pytest.mark.long
@over_samples
def test_opcheck(op, name, device, not_emulated):
    entry, sample = sample_of(op, name, device, torch.float32)
    # Not test_autograd_registration: these operators end the chain, and their formula raises.
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(entry.operator.default, tuple(sample.arguments.values()), test_utils=utils)


@over_ends
def test_third_order_raises(op, device):
    entry, sample = first_of(op, device)
    arguments = dict(sample.arguments)
    arguments["grad"] = arguments["grad"].clone().requires_grad_()
    results = [t for t in entry.operator(*arguments.values()) if t.numel() and t.requires_grad]
    with pytest.raises(RuntimeError, match="a recorded derivative cannot be differentiated"):
        results[0].sum().backward()


@over_operators
def test_vmap_is_a_loop(op, device):
    entry, sample = first_of(op, device)
    names = [n for n in tensors(sample.arguments) if n in ("u", "a", "b", "c") or "tangent" in n] or ["grad"]
    stacked = {n: torch.stack([sample.arguments[n] * k for k in (1.0, -2.0, 3.0)]) for n in names}

    def call(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return entry.operator(*{**sample.arguments, **dict(zip(names, cotangents))}.values())

    batched = torch.func.vmap(call)(*stacked.values())
    for k in range(3):
        assert_same_bits(tuple(t[k] for t in batched), call(*(v[k] for v in stacked.values())))


@over_operators
def test_wrong_tensors_are_refused(op, device):
    """A shape or dtype that does not fit is an error that names the operator and the argument, not a crash."""
    entry, sample = first_of(op, device, torch.float32)
    for name, value in tensors(sample.arguments).items():
        for wrong in (value[..., :-1], value.new_zeros([*value.shape, 2]), value.double(), value.int()):
            with pytest.raises(RuntimeError, match=rf"^{op}: .*\b(must|expected)\b.* got ") as error:
                entry.operator(*{**sample.arguments, name: wrong}.values())
            assert "csrc" not in str(error.value)


@over_operators
def test_infinite_values_stay_finite_where_they_can(op, device):
    """16-bit results are finite where the float64 reference, rounded, is."""
    entry, sample = first_of(op, device, torch.float16)
    arguments = {n: v * 100 if n in ("grad",) else v for n, v in sample.arguments.items()}
    actual = entry.operator(*arguments.values())
    exact = entry.reference(*cast(arguments).values())
    for what, a, e in zip(entry.outputs, actual, exact, strict=True):
        assert a.isfinite().equal(e.to(a.dtype).isfinite()), what
