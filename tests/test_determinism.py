"""The same bits: on every run, for every batch and number of threads, and whatever uninitialised memory held."""

import dataclasses
import hashlib
import math

import pytest
import torch

from cases import assert_same_bits, cotangents, over_chains, over_dtypes, over_filled, recorded_calls, run
from robustkern.ops import random_cotangents


def assert_same_derivatives(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@over_dtypes
@over_filled
def test_repeats(case, dtype, device):
    sample = case.sample(device, dtype)
    grad, u = cotangents(sample)
    expected = run(sample, grad, u)
    for _ in range(3):
        assert_same_derivatives(run(sample, grad, u), expected)


@over_dtypes
@over_chains
def test_a_row_alone_is_the_row_in_its_batch(case, dtype, device):
    sample = case.sample(device, dtype)
    grad, u = cotangents(sample)
    batch = run(sample, grad, u)
    for i in range(grad.shape[0]):
        row = slice(i, i + 1)
        alone = dataclasses.replace(sample, inputs=tuple(t[row] for t in sample.inputs))
        assert_same_derivatives(run(alone, grad[row], u[row]), tuple(d[row] for d in batch))


def many_rows(sample, elements=300_000):
    """A batch large enough to be worth a second thread."""
    copies = max(2, elements // sample.inputs[0].numel())
    repeated = tuple(t.repeat(copies, *(1,) * (t.dim() - 1)) for t in sample.inputs)
    options = {**sample.options}
    if options.get("towards") is not None:  # one for each row
        options["towards"] = options["towards"].repeat(copies)
    return dataclasses.replace(sample, inputs=repeated, options=options)


@pytest.mark.usefixtures("not_emulated")
@over_filled
def test_threads(case):
    before = torch.get_num_threads()
    sample = many_rows(case.sample("cpu", torch.float32))
    grad, u = cotangents(sample)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(sample, grad, u))
    finally:
        torch.set_num_threads(before)
    assert_same_derivatives(results[1], results[0])
    assert_same_derivatives(results[2], results[0])


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaNs."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@over_dtypes
@over_filled
def test_every_output_is_written(case, dtype, device):
    assert torch.empty(5, dtype=dtype, device=device).isnan().all()
    for call in recorded_calls(case.sample(device, dtype)).values():
        poisoned = call()
        torch.use_deterministic_algorithms(False)
        plain = call()
        torch.use_deterministic_algorithms(True)
        assert_same_bits(poisoned, plain)
        assert not any(t.isnan().any() for t in poisoned)


# ------------------------------------------------------------------ random_cotangents

# The same on the CPU with any instruction set, on CUDA and in the emulator, in this version and in later ones.
DIGESTS = {
    ("sphere", torch.float32): "279e3fd610b0924c",
    ("sphere", torch.float64): "6a950b100cc97a30",
    ("sphere", torch.float16): "eb7718ea088e5a9d",
    ("sphere", torch.bfloat16): "4d802933b0da7264",
    ("gaussian", torch.float32): "d29b4e8baacce7c5",
    ("gaussian", torch.float64): "6eaddd4faa03604a",
    ("gaussian", torch.float16): "b18c3fb8504bdeeb",
    ("gaussian", torch.bfloat16): "6d2faa6704a5d12e",
    ("rademacher", torch.float32): "97762eca0db15375",
    ("rademacher", torch.float64): "6ae2fbba3e8fd5b1",
    ("rademacher", torch.float16): "c2bfa7bfdba5b29b",
    ("rademacher", torch.bfloat16): "5e902600a38f0564",
    ("orthonormal", torch.float32): "928bbf07207e1818",
    ("orthonormal", torch.float64): "3d41fa05c36734db",
    ("orthonormal", torch.float16): "7d2a2eb29ffa566a",
    ("orthonormal", torch.bfloat16): "ede5fc7efe88619e",
}


def bits_of_cotangents(law, dtype, device):
    """A digest of w and of the gradient, over kinds and shapes."""
    digest = hashlib.sha256()
    for shape, projections in (((3, 10), 7), ((2, 37), 37), ((2, 3, 4, 5), 6), ((1, 1), 1), ((1, 300), 4)):
        outputs = (torch.arange(math.prod(shape)) * 37 % 64 / 8 - 4).reshape(shape).to(device, dtype).requires_grad_()
        for kind in ("plain", "centred", "fisher"):
            seed = torch.tensor([0x0123456789ABCDEF], device=device)
            w = random_cotangents(outputs, projections, law=law, kind=kind, seed=seed, impl="kernel")
            results = [w.detach()]
            if kind == "fisher":
                grad = (torch.arange(w.numel()) * 29 % 32 / 8 - 2).reshape(w.shape).to(device, dtype)
                results += torch.autograd.grad(w, outputs, grad)
            for result in results:
                digest.update(result.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@over_dtypes
@pytest.mark.parametrize("law", ["sphere", "gaussian", "rademacher", "orthonormal"])
def test_cotangents_have_the_same_bits_everywhere(law, dtype, device):
    assert bits_of_cotangents(law, dtype, device) == DIGESTS[law, dtype]


def test_a_sample_of_cotangents_depends_on_its_place_alone(device):
    """More samples or more projections do not change those before them."""
    outputs, seed = torch.randn(11, 10, device=device), torch.tensor([5], device=device)
    for law in ("sphere", "gaussian", "rademacher", "orthonormal"):
        options = {"law": law, "kind": "fisher", "seed": seed, "impl": "kernel"}
        whole = random_cotangents(outputs, 8, **options)
        for samples, projections in ((1, 8), (2, 3), (9, 1)):
            few = random_cotangents(outputs[:samples], projections, **options)
            assert_same_bits(few, whole[:projections, :samples].contiguous())


def test_cotangents_follow_their_generator(device):
    outputs = torch.randn(3, 5, device=device)

    def draw(seed=None):
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        return random_cotangents(outputs, 2, generator=generator, impl="kernel")

    assert_same_bits(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert_same_bits(draw(), first)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="generator must be on"):
        random_cotangents(outputs.to("meta"), 2, generator=torch.Generator())
