"""The largest singular value of a Jacobian, by power iteration."""

from typing import Literal, overload

import torch
from torch import Tensor

from robustkern._arguments import check_generator, check_integer
from robustkern._choices import Impl
from robustkern._input_gradient import check_differentiable, check_outputs, input_gradient
from robustkern.double_backward import fused_where_possible
from robustkern.ops.random_cotangents import random_cotangents
from robustkern.ops.row_norm import row_norm


@overload
def jacobian_spectral_norm(
    outputs: Tensor, x: Tensor, iterations: int = 10, *, start: Tensor | None = ...,
    generator: torch.Generator | None = ..., return_vectors: Literal[False] = ..., create_graph: bool | None = ...,
    impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def jacobian_spectral_norm(
    outputs: Tensor, x: Tensor, iterations: int = 10, *, start: Tensor | None = ...,
    generator: torch.Generator | None = ..., return_vectors: Literal[True], create_graph: bool | None = ...,
    impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def jacobian_spectral_norm(
    outputs: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, ...]
    iterations: int = 10,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_vectors: bool = False,
    create_graph: bool | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""||J_i^T v_i||_2 -> sigma_max(J_i), with v_i from power iteration on J J^T: v <- J J^T v / ||J J^T v||.

    The result is never above the true value, and an iteration never lowers it.  The error shrinks by
    (sigma_2 / sigma_1)^4 with each iteration.  An iteration works in the space of the outputs, the smaller of the two,
    and takes one backward pass and the derivative of one.  Few iterations are enough if `start` holds the vectors from
    the last call on the same samples.  With ten classes, say, `torch.linalg.matrix_norm(input_jacobian(outputs,
    x).flatten(2), 2)` is exact at the price of five iterations.

    Args:
        outputs: [B, C] or [B, C, d1, ...], computed from x by differentiable operations.
        x: the inputs, a leaf that requires grad.
        iterations: >= 0.
        start: the first v, in the shape of outputs, of any length; None: random.  Where it is zero, so is the result.
        generator: source of a random start, on the device of outputs; None: the default one.
        return_vectors: also return v, the left singular vectors, of the shape of outputs: the next start.
        create_graph: whether the result can be differentiated; by default, whether grad mode is on.
        impl: "auto", "kernel" or "reference".

    Returns:
        [B], float32 (float64 for float64 x); with return_vectors a pair.

    Raises:
        TypeError, ValueError, RuntimeError: as `jacobian_norm`.

    Differentiability: once more in the parameters and x if `create_graph`, with v held fixed, which is the derivative
    of the largest singular value once v has converged; zero where the Jacobian is zero. Determinism: given the start or
    the generator's state, as deterministic as the model's own backward. Source: Yoshida and Miyato,
    "Spectral norm regularization", 2017.

    >>> x = torch.rand(2, 2, requires_grad=True)
    >>> outputs = x * torch.tensor([3.0, 1.0])
    >>> rk.jacobian_spectral_norm(outputs, x, 20, create_graph=False).round(decimals=3).tolist()
    [3.0, 3.0]
    """
    function = "jacobian_spectral_norm"
    differentiable = torch.is_grad_enabled() if create_graph is None else create_graph
    check_outputs(function, outputs, x)
    check_integer(function, "iterations", iterations, 0)
    check_generator(function, generator, outputs.device)
    if start is not None and not isinstance(start, Tensor):
        raise TypeError(f"{function}: start must be a tensor or None, got {type(start).__name__}")
    if start is not None and (start.shape != outputs.shape or start.device != outputs.device):
        raise ValueError(
            f"{function}: start must be {list(outputs.shape)} on {outputs.device} like outputs, got "
            f"{list(start.shape)} on {start.device}"
        )
    with torch.enable_grad(), fused_where_possible(impl):
        if start is None:
            v = random_cotangents(outputs.detach(), 1, generator=generator, impl=impl)[0]
        else:
            v = start.detach().to(outputs.dtype)
        v = _normalized(v, v, impl)
        if iterations:
            # J^T w is linear in w, and its derivative in w along u is J u: two reverse modes make a forward one.
            w = torch.zeros_like(v, requires_grad=True)
            linear = input_gradient(function, "outputs", outputs, x, w, create_graph=True)
        for _ in range(iterations):
            u = input_gradient(function, "outputs", outputs, x, v, create_graph=False)
            (product,) = torch.autograd.grad(linear, w, _normalized(u, u, impl), retain_graph=True)
            v = _normalized(product, v, impl)
        grad = input_gradient(function, "outputs", outputs, x, v, create_graph=differentiable)
        if differentiable:
            check_differentiable(function, "outputs", grad)
    length = row_norm(v, 2.0, impl=impl)  # in half precision not quite one
    with torch.set_grad_enabled(differentiable):
        norm = row_norm(grad, 2.0, impl=impl) / torch.where(length > 0, length, 1.0)
    return (norm, v) if return_vectors else norm


def _normalized(t: Tensor, otherwise: Tensor, impl: Impl) -> Tensor:
    """t with each sample scaled to unit length; samples of length zero are taken from `otherwise`."""
    norm = row_norm(t.detach(), 2.0, impl=impl).view(-1, *(1 for _ in t.shape[1:]))
    return torch.where(norm > 0, t / torch.where(norm > 0, norm, 1.0), otherwise).to(t.dtype)
