"""Where the code that was published with the paper behind this package does not compute what it says.

Each test writes the published formula down in a few lines and shows the difference to what it stands for, and that
robustkern computes the latter. Source of the formulas: Helland and VanHoudnos, 2020, and its code.
"""

import pytest
import torch
from torch import nn

from robustkern import ops
from robustkern.losses import FisherPenalty, GradientPenalty

CLASSES, EPS = 5, 0.1


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x, torch.arange(6) % CLASSES


def half_the_trace_of_fisher(network, x):
    """E over the classes c of ||eps grad_x log p_c||^2 / 2, from its definition."""
    x = x.clone().requires_grad_()
    log_p = network(x).log_softmax(1)
    total = torch.zeros(len(x), dtype=x.dtype)
    for c in range(CLASSES):
        (grad,) = torch.autograd.grad(log_p[:, c].sum(), x, retain_graph=True)
        total += log_p[:, c].exp().detach() * (EPS * grad).flatten(1).square().sum(1)
    return total.mean() / 2


def published_fisher(network, x):
    """C / (2 B) sum_i ||eps grad_x z_i0 / p_i0||^2: always class 0, and 1 / p weighs a logit's gradient."""
    x = x.clone().requires_grad_()
    logits = network(x)
    (grad,) = torch.autograd.grad((logits[:, 0] / logits.softmax(1)[:, 0].detach()).sum(), x)
    return CLASSES / 2 * (EPS * grad).flatten(1).square().sum(1).mean()


def test_the_fisher_penalty_is_that_of_all_classes(network, batch):
    x, y = batch
    true = half_the_trace_of_fisher(network, x)
    ours = FisherPenalty(weight=1.0, projections="exact", eps=EPS)(network, x, y).smoothness / 2
    torch.testing.assert_close(ours, true)
    assert published_fisher(network, x) > 10 * true
    # It looks at one class: renaming the classes changes the published number, but not the true one.
    renamed = nn.Sequential(network, _Reverse())
    torch.testing.assert_close(half_the_trace_of_fisher(renamed, x), true)
    assert (published_fisher(renamed, x) / published_fisher(network, x)).log().abs() > 0.2
    # And the more certain a network is of another class, the larger 1 / p: the true trace vanishes there.
    certain = nn.Sequential(network, _Shift(30.0))
    assert published_fisher(certain, x) > 1e20
    assert FisherPenalty(weight=1.0, projections="exact", eps=EPS)(certain, x, y).smoothness < 1e-6


class _Reverse(nn.Module):
    def forward(self, logits):
        return logits.flip(1)


class _Shift(nn.Module):
    """Adds to the logit of the last class."""

    def __init__(self, much):
        super().__init__()
        self.register_buffer("shift", torch.tensor([0.0] * (CLASSES - 1) + [much], dtype=torch.float64))

    def forward(self, logits):
        return logits + self.shift


def published_penalty(network, x, y):
    """mean_i ||eps grad of the *mean* loss||_1: each sample's gradient is divided by the batch size."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(network(x), y), x)
    return (EPS * grad).flatten(1).abs().sum(1).mean()


def test_the_gradient_penalty_does_not_depend_on_the_batch_size(network, batch):
    x, y = batch
    ours = GradientPenalty(weight=1.0, p=1, eps=EPS)
    alone, twice = ours(network, x, y).smoothness, ours(network, x.repeat(2, 1, 1, 1), y.repeat(2)).smoothness
    torch.testing.assert_close(twice, alone)
    published = published_penalty(network, x, y)
    torch.testing.assert_close(published_penalty(network, x.repeat(2, 1, 1, 1), y.repeat(2)), published / 2)
    torch.testing.assert_close(published * len(x), alone)  # weight 64 at a batch of 128 is 0.5 here


def published_projection(delta, eps):
    """Those outside are divided by the norms of *all* samples: a shape that fits only if all are outside."""
    norm = delta.flatten(1).norm(dim=1)
    outside = norm > eps
    projected = delta.clone()
    projected[outside] = projected[outside] / norm.view(-1, 1, 1, 1) * eps
    return projected


def test_the_projection_on_the_l2_ball_takes_each_sample_by_itself():
    delta = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), 0.01), torch.full((3, 2, 2), 0.2)])
    with pytest.raises(RuntimeError, match="must match"):
        published_projection(delta, EPS)
    x = torch.full_like(delta, 0.4)
    image = x + delta
    ops.attack_step(image, x, torch.zeros_like(x), eps=EPS, step_size=0.0, norm="l2")  # a step of nothing, projected
    length = delta.flatten(1).norm(dim=1).clamp(max=EPS)
    torch.testing.assert_close((image - x).flatten(1).norm(dim=1), length)
    torch.testing.assert_close(image[1], x[1] + delta[1])
