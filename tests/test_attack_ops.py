"""attack_step and attack_start: kernel and reference alike, in place, for every layout, compiled and alone."""

import dataclasses

import pytest
import torch

from cases import assert_same_bits, over_dtypes
from robustkern import ops, reference
from robustkern.testing import assert_as_accurate_as_reference, cast
from tests.samples import Sample, samples_of

NAMES = [(op, sample.name) for op in ops.IN_PLACE for sample in samples_of(op)]
over_samples = pytest.mark.parametrize(("op", "name"), NAMES)
over_balls = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def sample_of(op, name, device="cpu", dtype=torch.float32):
    return next(s for s in samples_of(op, device, dtype) if s.name == name)


def fresh(sample, dtype=None):
    """The sample with inputs of its own, which may be written."""
    dtype = dtype or sample.inputs[0].dtype
    inputs = tuple(torch.empty_like(t, dtype=dtype).copy_(t) for t in sample.inputs)
    return dataclasses.replace(sample, inputs=inputs, options=cast(sample.options, dtype) if dtype else sample.options)


def results(sample):
    """(kernel, reference, reference in float64)."""
    kernel, eager, exact = fresh(sample), fresh(sample), fresh(sample, torch.float64)
    # The kernel sees numbers that were rounded when they were stored, and so must the truth.
    return kernel(impl="kernel"), eager(impl="reference"), exact(impl="reference")


@over_samples
@over_dtypes
def test_kernel_and_reference(op, name, dtype, device):
    sample = sample_of(op, name, device, dtype)
    kernel, eager, exact = results(sample)
    if sample.empty:
        assert kernel.shape == eager.shape
        return
    assert kernel.stride() == sample.inputs[0].stride() or not sample.inputs[0].is_contiguous()
    if dtype == torch.float64:
        eager = fresh(sample, torch.float32)(impl="reference")
    if dtype.itemsize == 2:  # the last place of a rounded number may fall to either side, but no further
        steps = (kernel.view(torch.int16).int() - eager.view(torch.int16).int()).abs()
        assert steps.max() <= 1
        assert (steps > 0).float().mean() < 0.02
    else:
        assert_as_accurate_as_reference(kernel, eager, exact, what=f"{sample}")


@over_samples
def test_same_bits_for_any_batch_and_number_of_threads(op, name, device):
    whole = fresh(sample_of(op, name, device))(impl="kernel")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_same_bits(fresh(sample_of(op, name, device))(impl="kernel"), whole)
    finally:
        torch.set_num_threads(threads)
    if op == "attack_step" and len(whole) > 1:
        part = fresh(sample_of(op, name, device))
        options = {**part.options}
        if options.get("scale") is not None:
            options["scale"] = options["scale"][1:2]
        rows = dataclasses.replace(part, inputs=tuple(t[1:2].clone() for t in part.inputs), options=options)
        assert_same_bits(rows(impl="kernel"), whole[1:2])


@over_samples
def test_only_the_buffer_is_written(op, name, device):
    sample = fresh(sample_of(op, name, device))
    before = [t.clone() for t in sample.inputs]
    result = sample(impl="kernel")
    if op == "attack_step":
        assert result is sample.inputs[0]
    for old, new in list(zip(before, sample.inputs))[1 if op == "attack_step" else 0 :]:
        assert_same_bits(new, old)


def test_autograd_knows_of_the_change():
    buffer, x = torch.rand(2, 3), torch.rand(2, 3)
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight * buffer).sum()
    ops.attack_step(buffer, x, eps=0.1, impl="kernel")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def recorded(sample):
    """The operator call that a sample makes."""
    from cases import _Recorder

    with _Recorder() as recorder, torch.no_grad():
        fresh(sample)(impl="kernel")
    return next(iter(recorder.calls.values()))


@over_samples
def test_opcheck(op, name, device):
    call = recorded(sample_of(op, name, device))
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(call.operator, call.arguments, test_utils=tests)


@over_balls
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_attack(norm, backend, device):
    """Two steps with a gradient between them, in one graph."""
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)).to(device)
    seed = torch.tensor([3], device=device)

    def attack(x):
        adversary = ops.attack_start(x, eps=0.1, norm=norm, seed=seed)
        for _ in range(2):
            grad = weight * adversary.cos()
            ops.attack_step(adversary, x, grad, eps=0.1, step_size=0.05, norm=norm)
        return adversary

    compiled = torch.compile(attack, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(compiled, attack(x))


@over_balls
def test_a_step_is_a_projection_without_a_gradient(norm, device):
    x = torch.rand(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    far = x + torch.randn(4, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    once = ops.attack_step(far.clone(), x, eps=0.5, norm=norm, impl="kernel")
    twice = ops.attack_step(once.clone(), x, eps=0.5, norm=norm, impl="kernel")
    torch.testing.assert_close(once, twice)
    assert not torch.equal(once, far)


# ------------------------------------------------------------------ wrong use

X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l3"}, "norm must be one of 'linf', 'l2', 'l1', got 'l3'"),
        ({"eps": torch.ones(3, 1, 1), "norm": "l2"}, r"eps must be one number for norm 'l2', got shape \[3, 1, 1\]"),
        (
            {"eps": torch.ones(3)},
            r"eps must be a number or broadcast over a sample of shape \[3, 4, 4\], got shape \[3\]",
        ),
        (
            {"step_size": torch.ones(2, 3, 1, 1)},
            r"step_size must be .*one value a channel is step_size.view\(-1, 1, 1\)",
        ),
        ({"grad": X[:1]}, r"grad must be \[2, 3, 4, 4\] float32 on cpu like x, got \[1, 3, 4, 4\] float32 on cpu"),
        ({"grad": X.double()}, "grad must be .*got .* float64"),
        ({"adversary": X.half()}, "adversary must be .*got .* float16"),
        ({"scale": torch.ones(3)}, r"scale must be \[2\] on cpu, got \[3\] on cpu"),
        ({"coordinates": 0}, "coordinates must be at least 1, got 0"),
    ],
)
def test_wrong_steps(change, message):
    arguments = {"adversary": X.clone(), "x": X, "grad": X, "eps": 0.1, "step_size": 0.1, **change}
    with pytest.raises(ValueError, match=f"attack_step: {message}"):
        ops.attack_step(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l0"}, "norm must be one of"),
        ({"seed": torch.tensor([1.0])}, r"seed must be \[1\] int64 on cpu like x, got \[1\] float32 on cpu"),
        ({"samples": torch.arange(3)}, r"samples must be \[2\] int64 on cpu like x, got \[3\] int64 on cpu"),
        ({"restart": -1}, r"restart must be in \[0, 2\^31\), got -1"),
    ],
)
def test_wrong_starts(change, message):
    with pytest.raises(ValueError, match=f"attack_start: {message}"):
        ops.attack_start(X, **{"eps": 0.1, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hinge"}, "kind must be 'cw' or 'dlr', got 'hinge'"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must have shape \[2\], got \[3\]"),
        ({"logits": torch.ones(2, 2), "kind": "dlr"}, "kind='dlr' needs at least 3 classes, got 2"),
        ({"logits": torch.ones(2, 3, 4)}, r"logits must be \[B, C\]"),
    ],
)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_wrong_margins(arguments, message, impl):
    given = {"logits": torch.ones(2, 5), "target": torch.zeros(2, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        ops.margin_loss(**given, impl=impl)


def test_classes_that_do_not_exist():
    with pytest.raises(RuntimeError, match=r"margin_loss: target must be in \[0, 5\), got 5 in row 1"):
        ops.margin_loss(torch.ones(2, 5), torch.tensor([0, 5]), impl="kernel")


def test_integers_are_refused():
    for call in (
        lambda: ops.attack_step(X.int(), X.int(), eps=1.0),
        lambda: ops.attack_start(X.int(), eps=1.0),
        lambda: ops.margin_loss(torch.ones(2, 5), torch.zeros(2)),
    ):
        with pytest.raises(TypeError):
            call()


def test_samples_cover_every_option():
    for op in ops.IN_PLACE:
        samples = list(samples_of(op))
        assert all(isinstance(s, Sample) and s.op is getattr(ops, op) for s in samples)
        assert any(s.empty for s in samples)
        assert any(not s.inputs[0].is_contiguous() for s in samples)
        assert getattr(reference, op)
