"""A small network whose Jacobian is known, and Jacobian norms by their definitions."""

import pytest
import torch
from torch import nn

KINDS = ("plain", "centred", "fisher")
LAWS = ("orthonormal", "sphere", "gaussian", "rademacher")
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_laws = pytest.mark.parametrize("law", LAWS)
over_impls = pytest.mark.parametrize("impl", ["auto", "reference"])
over_squares = pytest.mark.parametrize("squared", [True, False])


def network(device, dtype=torch.float64, classes=4):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(36, classes)]
    return nn.Sequential(*layers).to(device, dtype)


def images(device, dtype=torch.float64, count=6):
    x = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def jacobian_in_plain_pytorch(outputs, x):
    """The Jacobian [B, D, N], independent of this package."""
    rows = [torch.autograd.grad(one.sum(), x, create_graph=True)[0] for one in outputs.flatten(1).unbind(1)]
    return torch.stack(rows, 1).flatten(2)


def norm_in_plain_pytorch(outputs, x, kind, squared=True):
    """The norm by its definition, with C x C matrices; outputs [B, C, S]."""
    classes = outputs.shape[1]
    jacobian = jacobian_in_plain_pytorch(outputs, x).unflatten(1, outputs.shape[1:])
    if kind == "fisher":
        p = outputs.softmax(1)
        norm = torch.einsum("bcsn,bcs,bcsn->b", jacobian, p, jacobian)
        norm = norm - torch.einsum("bcsn,bcs->bsn", jacobian, p).square().sum((1, 2))
    else:
        if kind == "centred":
            jacobian = jacobian - jacobian.sum(1, keepdim=True) / classes
        norm = jacobian.square().sum((1, 2, 3))
    return norm if squared else norm.sqrt()


def parameter_gradients(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(model.parameters(), grads)]


def assert_equal_but_for_rounding(actual, expected, roundings=64):
    """Asserts equality in the max norm, up to the digits that a few sums in another order lose."""
    error, size = (actual - expected).abs().max(), expected.abs().max()
    assert error <= roundings * torch.finfo(expected.dtype).eps * size, f"{error:.2g} of {size:.2g}"
