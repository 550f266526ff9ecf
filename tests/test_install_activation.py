"""Installed activations, pooling and losses: what runs, what is saved, and which derivatives are zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustkern
from robustkern import _library
from tests.installed.activation import FUNCTIONS

pytestmark = pytest.mark.skipif(not _library.aten_extension(), reason="needs robustkern._aten")


class Calls(TorchDispatchMode):
    """Counts the operators that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def small_net(activation: Callable[[], nn.Module], channels: int = 4, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for k in range(layers):
        modules += [nn.Conv2d(3 if k == 0 else channels, channels, 3, padding=1), activation()]
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1)).double()


def image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()


def penalty_step(model: nn.Module, x: Tensor, with_loss: bool) -> tuple[Counter[str], list[Tensor | None]]:
    """The backward of a gradient penalty: the operators of its second half, and every parameter's gradient."""
    model.zero_grad()
    out = model(x).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    penalty = grad.square().sum()
    total = penalty + out if with_loss else penalty
    with Calls() as calls:
        total.backward(inputs=list(model.parameters()))
    return calls.count, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.ReLU6], ids=lambda a: a.__name__)
def test_penalty_of_a_piecewise_linear_network_takes_four_passes(activation: Callable[[], nn.Module]) -> None:
    """Two passes build the graph (F, B), and two form the penalty's backward (U, W2) instead of four."""
    model, x = small_net(activation), image()
    before, stock = penalty_step(model, x, with_loss=False)
    robustkern.install()
    after, ours = penalty_step(model, x, with_loss=False)
    layers = 4
    assert after["aten::convolution"] == after["aten::convolution_backward"] == layers  # U and W2 of each
    assert before["aten::convolution"] == 2 * layers  # the same two
    assert before["aten::convolution_backward"] == layers  # D and W1 together, over zeros
    assert after["aten::zeros_like"] == after["aten::zeros"] == 0
    for (name, _), a, b in zip(model.named_parameters(), stock, ours, strict=True):
        if b is None:
            assert name.endswith("bias"), name
            assert a is None or not a.any(), name
        else:
            torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize("with_loss", [False, True])
def test_materialized_zeros_are_those_of_pytorch(with_loss: bool) -> None:
    model, x = small_net(nn.ReLU), image()
    _, stock = penalty_step(model, x, with_loss)
    robustkern.install(materialize_zeros=True)
    _, ours = penalty_step(model, x, with_loss)
    for (name, _), a, b in zip(model.named_parameters(), stock, ours, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, msg=name)


def test_a_gradient_that_does_not_depend_on_x_still_requires_grad() -> None:
    """As in PyTorch: a penalty on it can be differentiated, and its derivative in x is nothing."""
    robustkern.install()
    x = image()
    (grad,) = torch.autograd.grad(F.relu(x).sum(), x, create_graph=True)
    assert grad.requires_grad
    grad.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_kernel_and_no_more(name: str) -> None:
    """The second backward of an activation is one fused operator, its first backward one kernel."""
    if name == "celu, negative alpha":
        pytest.skip("left to PyTorch")
    robustkern.install()
    x = image()
    y = FUNCTIONS[name](x)
    g = torch.ones_like(y).requires_grad_()
    with Calls() as first:
        (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
    with Calls() as second:
        torch.autograd.grad(grad, (g, x), torch.ones_like(grad))
    assert sum(n for op, n in first.count.items() if op.endswith("_backward")) == 1
    assert set(first.count) <= {*(op for op in first.count if op.endswith("_backward")), "aten::detach"}
    assert second.count.pop("robustkern::activation_double_backward") == 1
    from_result_to_x = {f"aten::{name}_backward"} if name in ("tanh", "sigmoid") else set()
    assert set(second.count) <= {"aten::ones_like", "aten::detach"} | from_result_to_x


@pytest.mark.parametrize("function", [F.silu, F.mish], ids=lambda f: f.__name__)
def test_a_plain_step_runs_pytorchs_kernels(function: Callable[[Tensor], Tensor]) -> None:
    x = image()

    def step() -> Counter[str]:
        with Calls() as calls:
            torch.autograd.grad(function(x).sum(), x)
        return calls.count

    stock = step()
    robustkern.install()
    assert step() == stock


def test_in_place_on_a_leaf_is_pytorchs_error() -> None:
    robustkern.install()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        F.silu(image(), inplace=True)


def test_in_place_counts_versions() -> None:
    """Overwriting what another node has saved must be noticed."""
    robustkern.install()
    x = image()
    y = x * 2.0
    z = y.exp()
    F.silu(z, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "elu", "tanh", "softplus", "hardswish"])
def test_third_derivative(name: str) -> None:
    x = image()

    def third() -> Tensor:
        (first,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return torch.autograd.grad(second.square().sum(), x)[0]

    stock = third()
    robustkern.install()
    torch.testing.assert_close(third(), stock)


def test_graphs_outlive_the_installation() -> None:
    x = image()

    def penalty() -> Tensor:
        (first,) = torch.autograd.grad(F.silu(F.gelu(x)).sum(), x, create_graph=True)
        return first.square().sum()

    (stock,) = torch.autograd.grad(penalty(), x)
    robustkern.install()
    built = penalty()
    forward = F.silu(F.gelu(x)).sum()
    robustkern.uninstall()
    torch.testing.assert_close(torch.autograd.grad(built, x)[0], stock)
    (first,) = torch.autograd.grad(forward, x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.square().sum(), x)[0], stock)


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of distinct tensors that the graph of a first backward keeps."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    y = function(x)
    g = torch.ones_like(y).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.autograd.grad(y, x, g, create_graph=True)
    return sum(kept.values())


def test_pooling_saves_no_input() -> None:
    robustkern.install()
    x = image()
    assert saved_bytes(lambda v: F.avg_pool2d(v, 2), x) == 0
    assert saved_bytes(lambda v: F.adaptive_avg_pool2d(v, 2), x) == 0
    assert saved_bytes(lambda v: F.max_pool2d(v, 2), x) == x.nbytes // 4  # places of maxima


def test_hardsigmoid_can_be_differentiated_twice() -> None:
    """PyTorch raises "not implemented"."""
    robustkern.install()
    x = image()
    assert torch.autograd.gradgradcheck(lambda v: F.hardsigmoid(v).square(), x.detach()[0, 0].clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["gelu", "gelu, tanh", "silu", "mish", "softplus", "elu"])
def test_half_precision_is_at_least_as_good_as_pytorchs(name: str, dtype: torch.dtype) -> None:
    values = torch.linspace(-60, 60, 4001, dtype=torch.float64).to(dtype)

    def second(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (first,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0].double()

    exact, stock = second(values.double()), second(values.clone())
    robustkern.install()
    ours = second(values.clone())
    assert ours.isfinite().all()
    assert not (ours - exact).norm() > 1.1 * (stock - exact).norm()  # mish of PyTorch is NaN for large float16 numbers
    assert (ours - exact).abs().max() <= torch.finfo(dtype).eps


def test_what_kernels_cannot_read_is_left_to_pytorch() -> None:
    robustkern.install()
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradgradcheck(torch.tanh, z)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(torch.log_softmax(x, 0, dtype=torch.float32).double().square().sum(), x,
                                   create_graph=True)  # fmt: skip
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


def test_torch_func_and_forward_mode() -> None:
    x = image().detach()

    def function(v: Tensor) -> Tensor:
        return F.max_pool2d(F.mish(F.silu(F.relu(v))), 2).log_softmax(1).square().sum()

    def hessian_vector(v: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(function), (v,), (torch.ones_like(v),))[1]

    stock = hessian_vector(x)
    robustkern.install()
    torch.testing.assert_close(hessian_vector(x), stock)


def test_vmap_over_second_derivatives() -> None:
    x = image()

    def seconds() -> Tensor:
        y = F.max_pool2d(F.silu(F.relu(x)), 2).log_softmax(1)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        directions = torch.eye(3, dtype=x.dtype).view(3, 1, 3, 1, 1).expand(3, *x.shape)
        return torch.autograd.grad(first, x, directions, is_grads_batched=True)[0]

    stock = seconds()
    robustkern.install()
    torch.testing.assert_close(seconds(), stock)


def test_compiled_steps() -> None:
    """A compiled model trains as before; its activations stay PyTorch's, which a compiler fuses with what is near."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()).double(), image()

    def step() -> list[Tensor]:
        torch._dynamo.reset()
        loss = torch.compile(model, backend="aot_eager")(x).square().sum()
        return list(torch.autograd.grad(loss, [x, *model.parameters()]))

    stock = step()
    robustkern.install()
    for a, b in zip(stock, step(), strict=True):
        torch.testing.assert_close(b, a)
