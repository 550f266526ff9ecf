"""Backwards that are differentiated by other means than another backward: tangents of forward mode, torch.func levels
above a graph that exists already, compiled autograd.  Installed agrees with PyTorch: nothing is silently dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import robustkern as rk
from robustkern.double_backward import replaced_operators
from tests import attention_backends
from tests.installed import attention


def _parameter(size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size, dtype=torch.float64)


def _heads(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, 2 * x, x.flip(2))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "gelu": (F.gelu, (4, 6)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), (4, 6)),
    "silu": (F.silu, (4, 6)),
    "silu in place": (lambda x: F.silu(x.clone(), inplace=True), (4, 6)),
    "mish": (F.mish, (4, 6)),
    "softplus": (lambda x: F.softplus(x, 2.0, 1.5), (4, 6)),
    "elu": (lambda x: F.elu(x, 1.5), (4, 6)),
    "elu in place": (lambda x: F.elu(x.clone(), 1.5, inplace=True), (4, 6)),
    "selu": (F.selu, (4, 6)),
    "hardswish": (F.hardswish, (4, 6)),
    "tanh": (torch.tanh, (4, 6)),
    "sigmoid": (torch.sigmoid, (4, 6)),
    "relu": (lambda x: F.relu(x) ** 3, (4, 6)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2) ** 3, (2, 3, 4, 4)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2, padding=1, divisor_override=3) ** 3, (2, 3, 4, 4)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)) ** 3, (2, 3, 4, 4)),
    "softmax": (lambda x: F.softmax(x, 1), (4, 6)),
    "log_softmax": (lambda x: F.log_softmax(x, 0), (4, 6)),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.arange(4), reduction="none"), (4, 6)),
    "layer_norm": (lambda x: F.layer_norm(x, (6,), _parameter(6), _parameter(6)), (4, 6)),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), _parameter(6)), (4, 6)),
    "group_norm": (lambda x: F.group_norm(x, 2, _parameter(4), _parameter(4)), (2, 4, 3, 3)),
    "group_norm channels_last": (
        lambda x: F.group_norm(x.to(memory_format=torch.channels_last), 2, _parameter(4), _parameter(4)),
        (2, 4, 3, 3),
    ),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, _parameter(3), _parameter(3), True), (4, 3, 2, 2)),
    "batch_norm eval": (
        lambda x: F.batch_norm(x, _parameter(3), _parameter(3), _parameter(3), None, False) ** 2,
        (4, 3, 2, 2),
    ),
    "conv2d": (lambda x: F.conv2d(x, torch.ones(2, 3, 2, 2, dtype=x.dtype)) ** 3, (2, 3, 4, 4)),
    "linear": (lambda x: F.linear(x, torch.ones(5, 6, dtype=x.dtype)) ** 3, (4, 6)),
}
over_functions = pytest.mark.parametrize("name", list(FUNCTIONS))


def _graph(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """y = f(x) with its graph, and a direction."""
    function, shape = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    return x, function(x), v


@over_functions
def test_tangents_of_a_first_backward(name):
    """A dual cotangent of a graph without tangents, as a dual head over another body gives it: J^T of the tangent."""
    x, y, _ = _graph(name)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (expected,) = torch.autograd.grad(y, x, cotangent)
    assert expected.any()
    rk.install()
    for create_graph in (False, True):
        x, y, _ = _graph(name)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(cotangent.cos(), cotangent)
            (grad,) = torch.autograd.grad(y, x, dual, create_graph=create_graph)
            torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, expected)


@over_functions
@pytest.mark.parametrize("create_graph", [False, True])
def test_tangents_of_a_second_backward(name, create_graph):
    def second(u: Tensor, create_graph: bool = False) -> Tensor:
        x, y, _ = _graph(name)
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad, x, u, create_graph=create_graph)[0]

    _, _, v = _graph(name)
    expected = second(v)
    assert expected.any()
    rk.install()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(second(forward_ad.make_dual(v.cos(), v), create_graph)).tangent
        torch.testing.assert_close(tangent, expected)


@over_functions
@pytest.mark.parametrize("transform", ["jvp", "vjp", "jacrev", "jacfwd", "grad"])
@pytest.mark.parametrize("order", [1, 2])
def test_transforms_over_a_graph(name, transform, order):
    """torch.func over the cotangent of a graph that exists already."""

    def run() -> Tensor:
        x, y, v = _graph(name)
        target, u = (y, torch.ones_like(y)) if order == 1 else (None, v)
        if target is None:
            (target,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)

        def pull(u: Tensor) -> Tensor:
            return torch.autograd.grad(
                target, x, u, retain_graph=True, create_graph=transform not in ("jvp", "jacfwd")
            )[0]

        if transform == "jvp":
            return torch.func.jvp(pull, (u,), (u.cos(),))[1].detach()
        if transform == "vjp":
            return torch.func.vjp(pull, u)[1](v.cos())[0].detach()
        if transform == "grad":
            return torch.func.grad(lambda u: (pull(u) * v).sum())(u).detach()
        return (torch.func.jacrev if transform == "jacrev" else torch.func.jacfwd)(pull)(u).detach()

    try:
        expected = run()
    except (RuntimeError, TypeError) as reason:
        pytest.skip(f"PyTorch itself: {str(reason).splitlines()[0]}")
    assert expected.any()
    rk.install()
    torch.testing.assert_close(run(), expected)


def test_a_dual_head_over_an_rms_norm():
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)).double(), nn.Linear(6, 1).double()
        x = torch.randn(8, 6, dtype=torch.float64)
        with forward_ad.dual_level():
            w = forward_ad.make_dual(head.weight, torch.ones_like(head.weight))
            grads = torch.autograd.grad(F.linear(body(x), w).square().sum(), list(body.parameters()))
            return [forward_ad.unpack_dual(t).tangent for t in grads]

    expected = run()
    rk.install()
    for actual, e in zip(run(), expected, strict=True):
        assert e.any()
        torch.testing.assert_close(actual, e)


@pytest.mark.parametrize("transform", ["jvp", "jacrev"])
def test_attention_agrees_with_the_math_backend(transform):
    """PyTorch has a second backward for the MATH backend only; install() adds the fused backend's."""

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        q, k, v, u = (torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(4))
        q.requires_grad_()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        (grad,) = torch.autograd.grad(y.sin().sum(), q, create_graph=True)

        def pull(u: Tensor) -> Tensor:
            return torch.autograd.grad(grad, q, u, retain_graph=True, create_graph=transform == "jacrev")[0]

        if transform == "jvp":
            return torch.func.jvp(pull, (u,), (u.cos(),))[1].detach()
        return torch.func.jacrev(pull)(u).detach()

    with sdpa_kernel(SDPBackend.MATH):
        expected = run()
    rk.install()
    assert expected.any()
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("create_graph", [False, True])
def test_tangents_through_attention(order, create_graph):
    """Tangents of the first backward, which PyTorch refuses, and of the second, which it has for MATH alone."""

    def pull(u: Tensor, create_graph: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
        y = F.scaled_dot_product_attention(q, k, v)
        if order == 1:
            return torch.stack(torch.autograd.grad(y, (q, k, v), u, create_graph=create_graph))
        grads = torch.autograd.grad(y.sin().sum(), (q, k, v), create_graph=True)
        return torch.stack(torch.autograd.grad(grads, (q, k, v), (u, 2 * u, -u), create_graph=create_graph))

    v = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = pull(v.cos())  # linear in its argument
    assert all(e.any() for e in expected)
    rk.install()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(pull(forward_ad.make_dual(v, v.cos()), create_graph)).tangent
        torch.testing.assert_close(tangent, expected)


# ------------------------------------------------------------------ attention

Inputs = tuple[Tensor, ...]


def _each(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def _scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).sin().sum()


def _dual_numbers(function: Callable[..., Tensor], x: Inputs, tangents: Inputs) -> Inputs:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(*map(forward_ad.make_dual, x, tangents))))


def _reverse_over_jvp(function: Callable[..., Tensor], x: Inputs, tangents: Inputs, order: int = 1) -> Inputs:
    leaves = [t.clone().requires_grad_() for t in (*x, *tangents)]
    value, tangent = torch.func.jvp(function, tuple(leaves[: len(x)]), tuple(leaves[len(x) :]))
    grads = torch.autograd.grad(value.cos().sum() + tangent.sin().sum(), leaves, create_graph=order > 1)
    return grads if order == 1 else torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def _vmap_of_jvp(function: Callable[..., Tensor], x: Inputs, tangents: Inputs) -> Inputs:
    several = tuple(torch.stack([t, t.cos(), -t]) for t in tangents)
    return torch.func.vmap(lambda *t: torch.func.jvp(function, x, t))(*several)


def _jvp_of_vmap(function: Callable[..., Tensor], x: Inputs, tangents: Inputs) -> Inputs:
    several = tuple(torch.stack([t, t.cos()]) for t in x)
    return torch.func.jvp(torch.func.vmap(function), several, tuple(torch.stack([t, -t]) for t in tangents))


Transform = Callable[[Callable[..., Tensor], Inputs, Inputs], Any]
TRANSFORMS: dict[str, Transform] = {
    "jvp": lambda f, x, t: torch.func.jvp(f, x, t),
    "jvp in the first input": lambda f, x, t: torch.func.jvp(lambda first: f(first, *x[1:]), x[:1], t[:1]),
    "dual numbers": _dual_numbers,
    "linearize": lambda f, x, t: torch.func.linearize(f, *x)[1](*t),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f, _each(x))(*x),
    "vmap of jvp": _vmap_of_jvp,
    "jvp of vmap": _jvp_of_vmap,
    "grad of jvp": lambda f, x, t: torch.func.grad(
        lambda *x: torch.func.jvp(f, x, t)[1].sin().sum(), _each(x)
    )(*x),
    "jvp of grad": lambda f, x, t: torch.func.jvp(torch.func.grad(_scalar(f), _each(x)), x, t),
    "jvp of jvp": lambda f, x, t: torch.func.jvp(
        lambda *x: torch.func.jvp(f, x, t)[1], x, tuple(u.cos() for u in t)
    ),
    "hessian": lambda f, x, t: torch.func.hessian(lambda first: _scalar(f)(first, *x[1:]))(x[0]),
    "reverse over jvp": _reverse_over_jvp,
    "reverse twice over jvp": lambda f, x, t: _reverse_over_jvp(f, x, t, order=2),
}  # fmt: skip


def _directions(inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs)


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("case", attention.CASES, ids=str)
def test_forward_mode_of_attention(case, transform):
    """In every form that PyTorch sends to a fused backend, as on the MATH backend."""
    inputs = case.inputs(torch.float64)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        return [t.detach() for t in tree_leaves(TRANSFORMS[transform](function, inputs, _directions(inputs)))]

    hidden = case.name == "row without keys"  # whose derivatives are NaN on the MATH backend
    expected = run(attention.without_the_hidden_row if hidden else case.stock)
    assert all(e.any() for e in expected)
    rk.install()
    for actual, e in zip(run(case.function), expected, strict=True):
        torch.testing.assert_close(actual, e)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "grad of jvp", "jvp of grad", "hessian", "reverse over jvp"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_forward_mode_of_attention(transform, backend, not_emulated):
    """Compiled as a whole; what is differentiated backwards from outside is compiled as the function that it is."""
    case = next(c for c in attention.CASES if c.name == "causal")
    inputs = case.inputs(torch.float64)
    tangents = _directions(inputs)
    expected = TRANSFORMS[transform](case.stock, inputs, tangents)
    rk.install()
    torch._dynamo.reset()
    if transform == "reverse over jvp":
        compiled = torch.compile(lambda *x: torch.func.jvp(case.function, x[:3], x[3:]), backend=backend)
        leaves = [t.clone().requires_grad_() for t in (*inputs, *tangents)]
        value, tangent = compiled(*leaves)
        actual = torch.autograd.grad(value.cos().sum() + tangent.sin().sum(), leaves)
    else:
        actual = torch.compile(lambda *x: TRANSFORMS[transform](case.function, x[:3], x[3:]), backend=backend)(
            *inputs, *tangents
        )
    torch._dynamo.reset()
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert e.any()
        torch.testing.assert_close(a, e)


def test_stock_raises_in_forward_mode():
    q = torch.randn(1, 2, 4, 3)
    with pytest.raises(NotImplementedError, match="Trying to use forward AD with _scaled_dot_product_flash_attention"):
        torch.func.jvp(_heads, (q,), (q,))


def test_forward_mode_of_a_mask():
    """A mask that moves, such as a learned bias of positions, and that is differentiated."""
    q, k, v = attention.CASES[0].inputs(torch.float64)
    bias = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)
    inputs = (q, k, v, bias)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    for transform in ("jvp", "vmap of jvp", "grad of jvp", "reverse over jvp", "reverse twice over jvp"):
        rk.uninstall()
        with sdpa_kernel(SDPBackend.MATH):
            expected = TRANSFORMS[transform](function, inputs, _directions(inputs))
        rk.install()
        for actual, e in zip(TRANSFORMS[transform](function, inputs, _directions(inputs)), expected, strict=True):
            assert e.any()
            torch.testing.assert_close(actual, e)


@pytest.mark.parametrize(
    "backend", ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"]
)
def test_forward_mode_of_every_backend_is_replaced(backend):
    name = f"aten::_scaled_dot_product_{backend}"
    assert name in replaced_operators("cpu")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCUDA")


@pytest.mark.parametrize(
    "transform",
    ["jvp", "linearize", "jacfwd", "vmap of jvp", "grad of jvp", "jvp of grad", "hessian", "reverse over jvp"],
)
@pytest.mark.parametrize("backend", list(attention_backends.CALLS))
def test_forward_mode_of_the_backends_for_cuda(backend, transform):
    """What they keep for their backwards comes back to them, whatever computes the tangents."""
    inputs = attention.CASES[0].inputs(torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = tree_leaves(TRANSFORMS[transform](_causal, inputs, _directions(inputs)))
    rk.install()
    with attention_backends.on_cpu_tensors():
        actual = tree_leaves(TRANSFORMS[transform](attention_backends.CALLS[backend], inputs, _directions(inputs)))
    for a, e in zip(actual, expected, strict=True):
        assert e.any()
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", list(attention_backends.CALLS))
def test_shapes_of_the_backends_for_cuda(backend):
    """Of fake tensors in bfloat16: what PyTorch says of its own operators meets what we say of ours."""
    rk.install()
    call = attention_backends.CALLS[backend]
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, 16, 64, dtype=torch.bfloat16) for _ in range(3))
        for result in (
            *torch.func.jvp(call, (q, k, v), (q, k, v)),
            *torch.func.jvp(torch.func.grad(_scalar(call)), (q, k, v), (q, k, v)),
            *_reverse_over_jvp(call, (q, k, v), (q, k, v)),
        ):
            assert result.shape == q.shape and result.dtype == q.dtype


def test_forward_mode_with_dropout_is_refused():
    q = torch.randn(1, 2, 4, 3)
    rk.install()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"with dropout needs sdpa_kernel"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(forward_ad.make_dual(q, q), q, q, 0.5)


def test_cotangents_of_a_jvp():
    """Several at once, and dual ones: the backward of what forward mode has recorded."""
    q, k, v = attention.CASES[0].inputs(torch.float64)
    tangents = _directions((q, k, v))

    def pull(transform: str) -> Any:
        leaves = [t.clone().requires_grad_() for t in (q, k, v, *tangents)]
        results = torch.func.jvp(_causal, tuple(leaves[:3]), tuple(leaves[3:]))
        several = torch.stack([q, q.cos(), k])

        def back(u: Tensor) -> Inputs:
            return torch.autograd.grad(results, leaves, (u, u.sin()), retain_graph=True)

        return torch.func.vmap(back)(several) if transform == "vmap" else torch.func.jvp(back, (q,), (k,))

    for transform in ("vmap", "jvp"):
        rk.uninstall()
        with sdpa_kernel(SDPBackend.MATH):
            expected = pull(transform)
        rk.install()
        for actual, e in zip(tree_leaves(pull(transform)), tree_leaves(expected), strict=True):
            assert e.any()
            torch.testing.assert_close(actual, e)


@pytest.fixture
def compiled_autograd():
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


class Attention(nn.Module):
    """Attention that depends on x through the values alone: queries and keys have no part in some derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (1, 2, 3))
        return F.scaled_dot_product_attention(x.detach(), x.detach(), self.value(x))


class ForwardAttention(Attention):
    """A loss in value and tangent: of the latter, attention's second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        value, tangent = torch.func.jvp(super().forward, (x,), (x.cos(),))
        return value + tangent.square()


NETWORKS = {
    "LayerNorm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 1)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.Linear(6, 1)),
    "ReLU": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)),
    "LeakyReLU": lambda: nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1)),
    "pooling": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 1), nn.MaxPool2d((1, 2), 1), nn.AvgPool2d(2, 1), nn.Flatten()
    ),
    "attention": lambda: Attention(),
    "attention in forward mode": lambda: ForwardAttention(),
    "SiLU": lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 1)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("penalised", [False, True])
def test_compiled_autograd(name, penalised, compiled_autograd):
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        network, x = NETWORKS[name]().double(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        loss = network(x).sin().sum()
        if penalised:
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = grad.square().sum()
        torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]

    try:
        with sdpa_kernel(SDPBackend.MATH):  # has a second derivative
            expected = run()
    except (RuntimeError, TypeError) as reason:
        pytest.skip(f"PyTorch itself: {str(reason).splitlines()[0]}")
    assert any(g.any() for g in expected)
    rk.install()
    for actual, e in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, e)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_group_norm_with_a_bias_and_no_weight(layout):
    """PyTorch's own kernel fails there: it takes the bias's dtype from the weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    b = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()

    def run(weight: Tensor | None) -> tuple[Tensor, ...]:
        y = F.group_norm(x, 2, weight, b).sin()
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum() + y.sum(), (x, b))

    expected = run(torch.ones(4, dtype=torch.float64))
    rk.install()
    for actual, e in zip(run(None), expected, strict=True):
        torch.testing.assert_close(actual, e)
