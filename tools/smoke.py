"""Whether an installed robustkern does what it is for: fused second derivatives, equal to PyTorch's, not zero."""

import platform

import torch

import robustkern as rk
from robustkern import _library
from robustkern.double_backward import replaced_operators


def penalised(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The gradients in the parameters of the squared norm of the input gradient alone."""
    x = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return list(torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True))


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.LazyLinear(10)
    ).double()
    x, y = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    model(x)
    stock = penalised(model, x, y)
    rk.install()
    assert replaced_operators(), _library.aten_why_unavailable()
    ours = penalised(model, x, y)
    for a, b in zip(ours, stock):
        if b is not None and b.abs().max() > 1e-12:
            torch.testing.assert_close(a, b)
    assert sum(float(b.abs().sum()) for b in stock if b is not None) > 0
    loss = rk.losses.GradientPenalty(eps=0.1)(model, x, y)
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    kernels = _library.extension()
    assert kernels is not None
    versions = f"robustkern {rk.__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    print(f"{versions}: {len(replaced_operators())} operators, {kernels.build_info()['cpu_runs']}")


if __name__ == "__main__":
    main()
