"""What random cotangents promise on average, under fixed seeds and within stated numbers of standard deviations.

A bound of 5 standard deviations is missed by chance once in 1.7 million tests; those on whole matrices cover
many numbers, so their bound is 6.  The seeds are fixed: a test that passes once passes always.
"""

import math

import pytest
import torch

from robustkern.ops import random_cotangents
from robustkern.ops.random_cotangents import KINDS, LAWS
from robustkern.reference.random_cotangents import philox

BATCH = 20_000
over_laws = pytest.mark.parametrize("law", LAWS)
over_kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("not_emulated")


def draw(outputs, projections, seed=7, **options):
    seeds = torch.tensor([seed], device=outputs.device)
    return random_cotangents(outputs, projections, seed=seeds, impl="kernel", **options)


def assert_mean(values, expected, bound):
    """The mean over the first dimension is as expected, by the deviation that the values themselves show."""
    deviation = values.std(0) / math.sqrt(values.shape[0])
    z = (values.mean(0) - expected).abs() / deviation.clamp_min(1e-6)
    assert z.max() < bound, f"{z.max():.1f} standard deviations"


def test_known_answers_of_philox():
    """The answers of Random123, by the authors of Philox: for zeros, ones, and digits of pi."""
    ones, answers = 0xFFFFFFFF, {}
    answers[(0, 0, 0, 0), (0, 0)] = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    answers[(ones, ones, ones, ones), (ones, ones)] = (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    answers[pi] = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    for (counter, key), expected in answers.items():
        words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(map(int, words)) == expected


@over_laws
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_second_moments_are_the_identity(law, size, device):
    v = draw(torch.zeros(BATCH, size, device=device, dtype=torch.float64), min(size, 3), law=law)
    assert_mean(v.flatten(0, 1)[:, :, None] * v.flatten(0, 1)[:, None, :], torch.eye(size, device=device), 6)
    assert_mean(v.flatten(0, 1), 0.0, 6)


@over_laws
@over_kinds
@pytest.mark.parametrize("shape", [(1,), (2,), (6,), (3, 4)], ids=str)
def test_second_moments_of_every_kind(law, kind, shape, device):
    """E[w w^T] = M M^T, with w = M v at each position by itself."""
    logits = torch.randn(shape, dtype=torch.float64).to(device)
    w = draw(logits.expand(BATCH, *shape), 1, law=law, kind=kind)[0].reshape(BATCH, shape[0], -1)
    p = logits.softmax(0).reshape(shape[0], -1)
    for s in range(w.shape[2]):
        q, eye = p[:, s], torch.eye(shape[0], device=device, dtype=torch.float64)
        factor = {
            "plain": eye,
            "centred": eye - 1.0 / shape[0],
            "fisher": (eye - q[:, None]) * q.sqrt(),
        }[kind]
        assert_mean(w[:, :, s, None] * w[:, None, :, s], factor @ factor.T, 6)
    if w.shape[2] > 1:  # positions are independent
        assert_mean(w[:, :, 0, None] * w[:, None, :, 1], 0.0, 6)


def estimates(law, matrix, projections, batch=BATCH):
    """mean_k ||J^T v_k||^2, whose expectation is tr(J J^T), for J J^T = `matrix`."""
    size = matrix.shape[0]
    v = draw(torch.zeros(batch, size, dtype=matrix.dtype, device=matrix.device), projections, law=law)
    return torch.einsum("kbi,ij,kbj->b", v, matrix, v) / projections


@over_laws
@pytest.mark.parametrize(("size", "projections"), [(2, 1), (2, 2), (10, 1), (10, 3), (10, 9)])
def test_variances_follow_their_laws(law, size, projections, device):
    root = torch.randn(size, size, dtype=torch.float64).to(device)
    a = root @ root.T
    trace, square, diagonal = a.trace(), a.square().sum(), a.diagonal().square().sum()
    sphere = 2 * size / (size + 2) * (square - trace**2 / size)
    variance = {
        "sphere": sphere,
        "gaussian": 2 * square,
        "rademacher": 2 * (square - diagonal),
        "orthonormal": sphere * (size - projections) / (size - 1),
    }[law] / projections
    values = estimates(law, a, projections)
    if law == "orthonormal" and projections == size:
        torch.testing.assert_close(values, trace.expand_as(values))
        return
    assert_mean(values, trace, 5)
    assert_mean((values - trace).square(), variance, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (10, 10), (100, 100), (3, 1000), (1000, 1000)], ids=str)
def test_frames_are_orthogonal_to_rounding(shape, dtype, device):
    """Rounding errors of a product of reflections grow like the square root of their number, that of sums too."""
    projections, size = shape
    v = draw(torch.zeros(2, size, dtype=dtype, device=device), projections, law="orthonormal")
    gram = torch.einsum("kbi,lbi->bkl", v.double(), v.double()) / size
    error = (gram - torch.eye(projections, device=device)).abs().max()
    assert error < (8 + 2 * math.sqrt(size)) * torch.finfo(dtype).eps


def test_all_directions_are_exact(device):
    a = torch.randn(50, 50, dtype=torch.float64).to(device)
    values = estimates("orthonormal", a @ a.T, 50, batch=20)
    torch.testing.assert_close(values, a.square().sum().expand_as(values))


def test_one_orthonormal_vector_is_the_sphere(device):
    """The same numbers up to rounding, drawn in another way."""
    outputs = torch.zeros(50, 37, device=device)
    sphere, frame = (draw(outputs, 1, law=law) for law in ("sphere", "orthonormal"))
    torch.testing.assert_close(frame, sphere)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_frames_are_uniformly_distributed(size, device):
    """Fourth moments, determinant, trace and single entries are those of Haar matrices."""
    q = draw(torch.zeros(BATCH, size, device=device, dtype=torch.float64), size, law="orthonormal")
    q = q.movedim(1, 0) / math.sqrt(size)  # [B, K, D]
    assert_mean(q.pow(4), 3 / (size * (size + 2)), 6)
    assert_mean(q[:, 0, :1].square() * q[:, 0, 1:].square(), 1 / (size * (size + 2)), 6)
    assert_mean(q[:, 0, 0].square() * q[:, 1, 1].square(), (size + 1) / ((size - 1) * size * (size + 2)), 6)
    assert_mean(q[:, 0, 0] * q[:, 1, 1] * q[:, 0, 1] * q[:, 1, 0], -1 / ((size - 1) * size * (size + 2)), 6)
    assert_mean(torch.linalg.det(q), 0.0, 6)
    # The trace of a Haar matrix: mean 0, variance 1.  A wrong sign of the reflections shows here first.
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    assert_mean(trace, 0.0, 6)
    assert_mean(trace.square(), 1.0, 6)
    # Turned by a fixed rotation, the same law: the first row's entry along a direction has the sphere's distribution.
    direction = torch.arange(1.0, size + 1, dtype=torch.float64, device=device)
    along = (q @ (direction / direction.norm())).sort(0).values
    other = q[..., 0].sort(0).values
    distance = (along - other).abs().mean(0)  # between distributions; it rarely exceeds 1.6 / sqrt(B)
    assert distance.max() < 4 / math.sqrt(BATCH)


def test_normal_numbers_are_normal(device):
    v = draw(torch.zeros(1000, 1000, device=device), 1, law="gaussian").flatten().double()
    assert_mean(torch.stack([v, v**2, v**3, v**4, v**6], 1), torch.tensor([0.0, 1, 0, 3, 15], device=device), 6)
    exact = torch.special.ndtr(v.sort().values)
    steps = torch.arange(1, v.numel() + 1, device=device) / v.numel()
    assert (exact - steps).abs().max() * math.sqrt(v.numel()) < 2.0  # Kolmogorov: exceeded with probability 7e-4
    assert v.abs().max() > 4.5


def test_samples_projections_and_seeds_are_independent(device):
    outputs = torch.zeros(BATCH, 4, device=device, dtype=torch.float64)
    v, other = draw(outputs, 2, law="gaussian"), draw(outputs, 2, seed=8, law="gaussian")
    for a, b in ((v[0], v[1]), (v[0, :-1], v[0, 1:]), (v[0], other[0]), (v[0], other[1])):
        assert_mean(a[:, :, None] * b[:, None, :], 0.0, 6)
