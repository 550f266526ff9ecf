"""What a graph of replaced operators saves, and under which conditions it works: wherever PyTorch's does.

Conditions: in-place writes, checkpoints while the switch changes, cotangents that are missing, batched or not finite,
and tensors with a `__torch_dispatch__` of their own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import robustkern as rk
from tests.installed import Case
from tests.test_installed import assert_close, fresh, normal_like, over_cases

SWITCH: dict[bool, Callable[[], None]] = {True: rk.install, False: rk.uninstall}


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the exception."""
    try:
        return function()
    except (RuntimeError, TypeError) as error:
        return error


def assert_runs_where_stock_does(
    run: Callable[[Callable[..., Tensor]], list[Tensor]], case: Case, right: Callable[..., Tensor] | None = None
) -> None:
    """`run` on the case's function must be right where PyTorch runs the function or its stand-in; else it may refuse.

    What PyTorch refuses and robustkern runs is right, too, if the function has a stand-in to tell.
    """
    rk.uninstall()
    stand_in = right or case.stock or case.function
    expected = attempt(lambda: run(stand_in if case.crashes or right else case.function))
    instead = attempt(lambda: run(stand_in)) if isinstance(expected, Exception) else expected
    rk.install()
    actual = attempt(lambda: run(case.function))
    rk.uninstall()
    if isinstance(expected, Exception):
        if isinstance(actual, Exception) or isinstance(instead, Exception):
            return
        expected = instead
    if isinstance(actual, Exception) and case.crashes:
        return  # nobody knows whether PyTorch does
    if isinstance(actual, Exception):
        raise AssertionError("PyTorch runs this") from actual
    assert_close(actual, expected)


def gradients(value: Tensor, inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True, **options))


def penalty(value: Tensor, inputs: tuple[Tensor, ...], wrt: int = 0) -> Tensor:
    (grad,) = torch.autograd.grad(value.sin().sum(), inputs[wrt], create_graph=True)
    return grad.square().sum()


@over_cases
@pytest.mark.parametrize("order", [1, 2])
def test_writes_into_inputs(case, order, device):
    """After the forward, or after the first backward, a write into an input is refused where PyTorch refuses it."""
    if case.crashes or (order == 2 and "RMSNorm" in case.name):
        pytest.skip("PyTorch composes this one, and keeps other tensors")
    count = len(case.inputs(torch.float64))
    for written, wrt in itertools.product(range(count), range(count)):

        def run(function: Callable[..., Tensor], written: int = written, wrt: int = wrt) -> list[Tensor]:
            inputs = fresh(case, device)
            value = function(*inputs)
            if order == 2:
                value = penalty(value, inputs, wrt)
            with torch.no_grad():
                inputs[written].mul_(1.0)
            return gradients(value, (inputs[wrt],))

        assert_runs_where_stock_does(run, case)


@over_cases
def test_parameters_made_under_inference_mode(case, device):
    for made in range(1, len(case.inputs(torch.float64))):

        def run(function: Callable[..., Tensor], made: int = made) -> list[Tensor]:
            inputs = list(fresh(case, device))
            with torch.inference_mode():
                inputs[made] = inputs[made].clone()
            return gradients(function(*inputs).sum(), (inputs[0],))

        assert_runs_where_stock_does(run, case)


def moved(before: bool, after: bool) -> dict[str, bool]:
    return {"before": before, "after": after}


@over_cases
@pytest.mark.parametrize("before, after", [(False, True), (True, False), (True, True)])
def test_checkpoint_under_a_moving_switch(case, before, after, device):
    """A checkpoint repeats its forward under the switch of the backward: what it saves must not depend on that."""
    inputs = fresh(case, device)

    def doubled(*args: Tensor) -> Tensor:
        value = case.function(*args)
        return value.sum() + penalty(value, args)

    twice = case.stock is None  # attention has no second derivative in PyTorch
    for function in (case.function, doubled) if twice else (case.function,):

        def run(recompute: bool, function: Callable[..., Tensor] = function) -> list[Tensor]:
            value = checkpoint(function, *inputs, use_reentrant=False) if recompute else function(*inputs)
            SWITCH[after]()
            return gradients(value.sin().sum(), inputs)

        expected = run(False)
        SWITCH[before]()
        assert_close(run(True), expected)
        rk.uninstall()


@over_cases
def test_saves_what_pytorch_saves(case, device):
    """Under hooks, in the same order: hooks that pack and unpack may count their calls."""

    def packed(switch: bool) -> list[tuple[torch.Size, torch.dtype]]:
        seen: list[tuple[torch.Size, torch.dtype]] = []

        def pack(t: Tensor) -> Tensor:
            seen.append((t.shape, t.dtype))
            return t

        inputs = fresh(case, device)
        SWITCH[switch]()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            case.function(*inputs)
        return seen

    assert packed(True) == packed(False)


@pytest.mark.parametrize(
    "in_place", [F.silu, F.mish, F.elu, F.selu, F.celu, F.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardswish]
)
@pytest.mark.parametrize("before", [torch.tanh, torch.exp, lambda h: h * h.detach(), F.softplus])
def test_checkpoint_ending_in_place(in_place, before):
    """The repeated forward ends where the last tensor is saved, which is before anything is overwritten."""
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).requires_grad_()

    def run() -> list[Tensor]:
        value = checkpoint(lambda x: in_place(before(x), inplace=True), x, use_reentrant=False)
        return gradients(value.square().sum(), (x,))

    expected = run()
    rk.install()
    assert_close(run(), expected)


class Stop(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@over_cases
@pytest.mark.parametrize("order", [1, 2, 3])
def test_undefined_cotangents(case, order, device):
    """In one of the orders, no cotangent arrives from one of the paths."""

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = fresh(case, device)
        value = function(*inputs)
        if order == 1:
            other = sum(t.square().sum() for t in inputs)
            grads = gradients(Stop.apply(value).sum() + other, inputs, create_graph=True)
            return [*grads, *gradients(sum(g.square().sum() for g in grads), inputs)]
        chosen = inputs if order == 2 else inputs[:1]
        grads = gradients(F.relu(value).sum(), chosen, create_graph=True)
        stopped = sum(Stop.apply(g).sum() + g.square().sum() for g in grads) + value.sum()
        if order == 3:
            stopped = sum(g.square().sum() for g in gradients(stopped, chosen, create_graph=True))
        return [g.detach() for g in gradients(stopped, inputs, create_graph=True)] if stopped.requires_grad else []

    assert_runs_where_stock_does(run, case, case.third if order == 3 else None)


@over_cases
def test_zeros_where_pytorch_gives_zeros(case, device):
    """torch.autograd.grad gives for every single input what PyTorch gives, or raises."""
    inputs = fresh(case, device)
    for wrt in range(len(inputs)):

        def run(function: Callable[..., Tensor], wrt: int = wrt) -> list[Tensor]:
            grads = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
            return list(torch.autograd.grad(grads, [inputs[wrt]], [torch.ones_like(g) for g in grads]))

        assert_runs_where_stock_does(run, case)


class Foreign(Tensor):
    """A tensor around another that runs PyTorch's operators on it, and knows no others."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} has no sharding strategy")
        tree_map = torch.utils._pytree.tree_map
        unwrapped = tree_map(lambda t: t.inner if isinstance(t, Foreign) else t, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        return tree_map(lambda t: Foreign(t) if isinstance(t, Tensor) else t, result)

    __torch_function__ = torch._C._disabled_torch_function_impl


@over_cases
@pytest.mark.parametrize("order", [1, 2])
def test_tensors_that_answer_for_themselves(case, order, device):
    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = tuple(Foreign(t.detach()).requires_grad_() for t in fresh(case, device))
        value = function(*inputs)
        if order == 2:
            value = penalty(value, inputs)
        return [g.inner if isinstance(g, Foreign) else g for g in gradients(value.square().sum(), inputs)]

    assert_runs_where_stock_does(run, case)


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers in every order of memory."""
    yield "contiguous", t.contiguous()
    if t.dim() == 4:
        yield "channels_last", t.contiguous(memory_format=torch.channels_last)
    if t.dim() == 5:
        yield "channels_last_3d", t.contiguous(memory_format=torch.channels_last_3d)
    if t.dim() > 1:
        yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
        yield "strided", torch.stack([t, t], -1)[..., 0]


def by_vmap(value: Tensor, inputs: tuple[Tensor, ...], cotangents: Tensor, create_graph: bool) -> list[Tensor]:
    def pull(c: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients(value, inputs, grad_outputs=c, retain_graph=True, create_graph=create_graph))

    return list(torch.func.vmap(pull)(cotangents))


def by_grads_batched(value: Tensor, inputs: tuple[Tensor, ...], cotangents: Tensor, create_graph: bool) -> list[Tensor]:
    options = {"retain_graph": True, "create_graph": create_graph, "is_grads_batched": True}
    return gradients(value, inputs, grad_outputs=cotangents, **options)


def by_loop(value: Tensor, inputs: tuple[Tensor, ...], cotangents: Tensor, create_graph: bool) -> list[Tensor]:
    options = {"retain_graph": True, "create_graph": create_graph}
    return [torch.stack(g) for g in zip(*[gradients(value, inputs, grad_outputs=c, **options) for c in cotangents])]


BATCHED = {"vmap": by_vmap, "is_grads_batched": by_grads_batched}


@over_cases
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("way", BATCHED)
@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
def test_batched_passes_in_every_layout(case, order, way, create_graph, device):
    """Batched first, second and third derivatives, and their gradients, are those of a loop over the cotangents."""
    original = fresh(case, device)
    for name, x in layouts(original[0].detach()):
        inputs = (x.detach().requires_grad_(), *original[1:])

        def derivative(inputs: tuple[Tensor, ...] = inputs) -> Tensor:
            value = case.function(*inputs)
            for _ in range(order - 1):
                (value,) = torch.autograd.grad(value.sin().sum(), inputs[0], create_graph=True)
            if value.requires_grad:
                gradients(value.sum(), inputs, retain_graph=True)
            return value

        rk.install()
        value = attempt(derivative)
        if isinstance(value, Exception):
            rk.uninstall()
            assert isinstance(attempt(derivative), Exception), "PyTorch runs this"
            continue
        if not value.requires_grad:
            continue
        cotangents = torch.stack([normal_like(value, seed) for seed in range(2)])
        results = {}
        for each in (by_loop, BATCHED[way]):
            grads = each(value, inputs, cotangents, create_graph)
            mixed = sum((normal_like(g, 5 + i) * g).sum() for i, g in enumerate(grads))
            results[each] = [g.detach() for g in grads]
            if create_graph and mixed.requires_grad:
                results[each] += gradients(mixed, inputs, retain_graph=True)
        try:
            assert_close(results[BATCHED[way]], results[by_loop])
        except AssertionError as error:
            raise AssertionError(name) from error


@over_cases
@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
def test_vectorized_hessian(case, create_graph, device):
    original = fresh(case, device)
    for _, x in layouts(original[0].detach()):
        for in_forward in (False, True):

            def run(function: Callable[..., Tensor], x: Tensor = x, in_forward: bool = in_forward) -> list[Tensor]:
                scalar = lambda x: function(x, *original[1:]).sin().sum()  # noqa: E731
                outer = "forward-mode" if in_forward else "reverse-mode"
                options = {} if in_forward else {"create_graph": create_graph}
                return [
                    torch.autograd.functional.hessian(
                        scalar, x, vectorize=True, outer_jacobian_strategy=outer, **options
                    ).detach()
                ]

            if in_forward and create_graph:
                continue
            assert_runs_where_stock_does(run, case)


@over_cases
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_not_finite_values_stay_where_they_are(case, bad, device):
    """With one such value anywhere, every second derivative is finite wherever it is in PyTorch."""
    count = len(case.inputs(torch.float64))
    for where in [*range(count), None]:
        for which in range(count):

            def spoil(t: Tensor) -> None:
                t[tuple(n // 2 for n in t.shape)] = bad

            def found(function: Callable[..., Tensor], where: Any = where, which: int = which) -> list[Tensor]:
                inputs = [t.detach() for t in fresh(case, device)]
                if where is not None:
                    spoil(inputs[where])
                inputs = [t.requires_grad_() for t in inputs]
                value = function(*inputs)
                cotangent = normal_like(value, 3)
                if where is None:
                    spoil(cotangent)
                cotangent.requires_grad_()
                (first,) = torch.autograd.grad(value, inputs[which], cotangent, create_graph=True)
                if not first.requires_grad:
                    return []
                return [
                    g.isfinite() for g in gradients(first, (*inputs, cotangent), grad_outputs=torch.ones_like(first))
                ]

            stock = attempt(lambda: found((case.stock or case.function) if case.crashes else case.function))
            if isinstance(stock, Exception):
                stock = found(case.stock or case.function)
            rk.install()
            ours = found(case.function)
            rk.uninstall()
            for i, (s, o) in enumerate(zip(stock, ours, strict=True)):
                assert not (s & ~o).any(), f"{bad} in input {where}, gradient {i} of that in input {which}"


def test_switch_is_asked_when_a_graph_is_built(device):
    """A graph keeps the derivatives it was built with, whatever the switch says when it is run."""
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, device=device).requires_grad_()
    with contextlib.ExitStack():
        value = penalty(F.group_norm(x, 2), (x,))
        expected = gradients(value, (x,), retain_graph=True)
        rk.install()
        assert_close(gradients(value, (x,)), expected)
