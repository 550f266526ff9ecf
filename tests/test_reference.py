"""The references, against closed forms, against PyTorch's own functions, and at their corners."""

import math

import pytest
import torch
import torch.nn.functional as F

from robustkern import reference
from robustkern.testing import derivatives

X = torch.tensor([[3.0, -4.0, 0.0], [1.0, -2.0, 2.0]], dtype=torch.float64)
CLOSED_FORMS = {
    (1.0, False): [7.0, 5.0],
    (2.0, False): [5.0, 3.0],
    (2.0, True): [25.0, 9.0],
    (math.inf, False): [4.0, 2.0],
    (3.0, False): [91 ** (1 / 3), 17 ** (1 / 3)],
}


@pytest.mark.parametrize(("p", "squared"), CLOSED_FORMS)
def test_norms_by_hand(p, squared):
    expected = torch.tensor(CLOSED_FORMS[p, squared], dtype=torch.float64)
    torch.testing.assert_close(reference.row_norm(X, p, squared=squared), expected)
    weight = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(reference.row_norm(X, p, weight, squared=squared), expected * (4 if squared else 2))


def test_second_derivative_of_the_l2_norm_by_hand():
    """H = (I - a a^T) / n with a = x / n."""
    x, v = X[1:], torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    a = x / 3
    expected = (v - a * (a * v).sum()) / 3
    one = torch.ones(1, dtype=torch.float64)
    result = derivatives(reference.row_norm, x, one, v)
    torch.testing.assert_close(result.second, expected)
    torch.testing.assert_close(result.grad_x, a)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 1.5, math.inf])
def test_norms_are_those_of_pytorch(p):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    grad, u = torch.randn(4, dtype=torch.float64), torch.randn_like(x)
    theirs = derivatives(lambda v: torch.linalg.vector_norm(v.flatten(1), ord=p, dim=1), x, grad, u)
    ours = derivatives(lambda v: reference.row_norm(v, p), x, grad, u)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 1.5, math.inf])
def test_norms_have_zero_derivatives_at_zero(p):
    result = derivatives(lambda v: reference.row_norm(v, p), torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3))
    assert not any(derivative.any() for derivative in result)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_norms_of_tiny_and_huge_rows(size):
    for p in (2.0, 3.0, 1.5):
        torch.testing.assert_close(reference.row_norm(size * X, p) / size, reference.row_norm(X, p))


def cross_entropy_by_hand(z, q, temperature):
    p = torch.exp(z / temperature) / torch.exp(z / temperature).sum(1, keepdim=True)
    return -(q * p.log()).sum(1), (p * q.sum(1, keepdim=True) - q) / temperature


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_cross_entropy_by_hand(smoothing, temperature):
    z, one = torch.randn(5, 4, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    classes = torch.tensor([0, 3, 1, 2, 2])
    soft = torch.rand(5, 4, dtype=torch.float64)
    for target, distribution in ((classes, F.one_hot(classes, 4).double()), (soft, soft)):
        q = (1 - smoothing) * distribution + smoothing / 4
        options = {"label_smoothing": smoothing, "temperature": temperature}
        result = derivatives(
            lambda v, t=target, o=options: reference.softmax_cross_entropy(v, t, **o), z, one, torch.ones_like(z)
        )
        loss, gradient = cross_entropy_by_hand(z, q, temperature)
        torch.testing.assert_close(result.value, loss)
        torch.testing.assert_close(result.grad_x, gradient)


def test_ignored_samples():
    z, target = torch.randn(3, 4, requires_grad=True), torch.tensor([1, -100, 2])
    loss = reference.softmax_cross_entropy(z, target)
    loss.sum().backward()
    assert loss[1] == 0
    assert not z.grad[1].any()
    assert z.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_references_sum_16_bit_data_in_float32(dtype):
    x = torch.full((1, 10_000), 0.1, dtype=dtype)
    assert reference.row_norm(x, 1.0).dtype == torch.float32
    torch.testing.assert_close(reference.row_norm(x, 1.0).double(), 10_000 * x[:, 0].double())
    assert reference.softmax_cross_entropy(x, torch.tensor([3])).dtype == torch.float32
