"""How accurate is accurate enough: the one check that every kernel passes.

Public, so that kernels written elsewhere can be held to the same standard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Derivatives", "assert_as_accurate_as_reference", "cast", "derivatives"]


class Derivatives(NamedTuple):
    """A function value y = f(x) and its derivatives, as `derivatives` computes them.

    >>> from robustkern.testing import derivatives
    >>> one = torch.ones(2)
    >>> derivatives(torch.sin, torch.zeros(2), one, one).grad_x.tolist()  # cos 0
    [1.0, 1.0]
    """

    value: Tensor  # y
    grad_x: Tensor  # grad . dy/dx
    gg_grad: Tensor  # d<u, grad_x>/d grad
    second: Tensor  # d<u, grad_x>/d x


def derivatives(
    function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, u: Tensor, orders: int = 2
) -> Derivatives:
    """y = f(x), its backward, and both outputs of its double backward.

    Args:
        function: f, twice differentiable.
        x: the point; it is detached first and keeps its layout.
        grad: cotangent of y, shaped like y.
        u: cotangent of grad_x, shaped like x.
        orders: how often f is differentiated: 0 to 2.

    Returns:
        Four detached tensors; zeros for a derivative that is absent from the graph or was not asked for.

    >>> from robustkern.testing import derivatives
    >>> x, one = torch.tensor([1.0, 2.0]), torch.ones(2)
    >>> derivatives(lambda x: x**3, x, one, one).second.tolist()  # 6 x
    [6.0, 12.0]
    """
    x = x.detach().requires_grad_()
    grad = grad.detach().requires_grad_()
    value = function(x)
    grad_x, gg_grad, second = torch.zeros_like(x), None, None
    if orders > 0:
        (grad_x,) = torch.autograd.grad(value, x, grad, create_graph=orders > 1)
    if orders > 1:
        gg_grad, second = torch.autograd.grad(grad_x, (grad, x), u, allow_unused=True)
    gg_grad = torch.zeros_like(grad) if gg_grad is None else gg_grad
    second = torch.zeros_like(x) if second is None else second
    return Derivatives(value.detach(), grad_x.detach(), gg_grad.detach(), second.detach())


def cast(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Converts floating-point tensors, also those in tuples, lists and dictionaries; leaves the rest as it is.

    >>> from robustkern.testing import cast
    >>> cast({"x": torch.ones(2), "p": 1})["x"].dtype
    torch.float64
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast(item, dtype) for item in value)
    return value


def assert_as_accurate_as_reference(
    actual: Tensor, eager: Tensor, exact: Tensor, *, zero: bool = False, what: str = "result"
) -> None:
    """error(actual) <= 2 error(eager) + 4 eps, relative to exact, in the L2 norm and in the maximum norm.

    A kernel may be off by twice as much as plain PyTorch is in the same dtype; nobody has to invent a tolerance.  Since
    both norms are taken over the whole tensor and `exact` must not be zero, a kernel that returns zeros fails.

    Args:
        actual: what the kernel returned.
        eager: the reference on the same inputs in the same dtype.  For a float64 `actual`, where the reference
            would be compared with itself, the reference in float32; its error then counts in units of eps.
        exact: the reference in float64 on the same inputs, converted with `cast`.
        zero: whether `exact` is meant to be zero; errors are then absolute.
        what: name of the result in messages.

    Raises:
        AssertionError: the shape, dtype or device differs from that of `eager`, an element is not finite, `exact` is
            zero without `zero` or the other way round, or the error is too large; the message holds the numbers.

    >>> from robustkern.testing import assert_as_accurate_as_reference
    >>> x = torch.linspace(0, 1, 5)
    >>> assert_as_accurate_as_reference(x.exp(), x.exp(), x.double().exp())
    """
    for name, other in (("eager", eager), ("exact", exact)):
        if actual.shape != other.shape:
            raise AssertionError(f"{what} has shape {list(actual.shape)}, {name} has {list(other.shape)}")
    rounding = torch.float32 if actual.dtype == torch.float64 else actual.dtype
    if eager.dtype != rounding or actual.device != eager.device:
        raise AssertionError(
            f"{what} is {actual.dtype} on {actual.device}, eager {eager.dtype} on {eager.device} instead of {rounding}"
        )
    if exact.dtype != torch.float64:
        raise AssertionError(f"exact {what} must be float64, got {exact.dtype}")
    if exact.numel() == 0:
        return
    actual, eager, exact = actual.detach(), eager.detach(), exact.detach().to(actual.device)
    for name, tensor in (("exact", exact), ("actual", actual)):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise AssertionError(f"{name} {what}: {bad} of {tensor.numel()} elements are not finite")
    if bool((exact == 0).all()) != zero:
        raise AssertionError(
            f"exact {what} is not zero" if zero else f"exact {what} is zero, so there is nothing to compare with"
        )
    eps = torch.finfo(actual.dtype).eps
    for name, norm in (("L2", torch.linalg.vector_norm), ("maximum", partial(torch.linalg.vector_norm, ord=torch.inf))):
        size = 1.0 if zero else float(norm(exact))
        error = float(norm(actual.double() - exact)) / size
        yardstick = float(norm(eager.double() - exact)) / size * (eps / torch.finfo(eager.dtype).eps)
        allowed = 4 * eps + (2 * yardstick if yardstick == yardstick else 0.0)  # a NaN of the reference excuses nothing
        if not error <= allowed:
            worst = int((actual.double() - exact).abs().argmax())
            index = [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
            there = f"worst at {index}: {actual.flatten()[worst].item():.9g}, exact {exact.flatten()[worst].item():.9g}"
            raise AssertionError(
                f"{what}: {name} error {error:.3g} exceeds 2 * {yardstick:.3g} (reference in {eager.dtype}) + 4 eps "
                f"= {allowed:.3g}; {there}"
            )
