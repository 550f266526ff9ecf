"""row_norm: the norm of each sample, its gradient and its second derivative."""

import math

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import Impl
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._chains import register_chain
from robustkern.ops._register import register_fake, register_row_vmap
from robustkern.ops._select import check_floating, use_kernel


def row_norm(
    x: Tensor,  # [B, ...]
    p: float = 2.0,
    weight: Tensor | float | None = None,  # [C], [C, 1, 1] or a number
    *,
    squared: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # [B]
    r"""n_i = ||w * x_i||_p, with weight w_c on channel c = dimension 1 of x.

    Sums run in float32 for 16- and 32-bit data and in float64 for float64.  Rows of tiny or huge numbers neither
    vanish nor overflow. Bytes moved: x once for the value, x once more and the result once for each derivative.

    Args:
        x: samples, [B, ...] float32, float64, float16 or bfloat16, of any layout; B may be 0.
        p: 1, 2, inf or any number >= 1.
        weight: a number, or one value per channel ([C], or anything with C elements that broadcasts against x_i
            along it); such as eps / std. Not differentiated.
        squared: n_i^2 instead of n_i; p = 2 only.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        [B], float32 for 16- and 32-bit inputs, float64 for float64.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: p < 1, `squared` without p = 2, or a weight that does not match dimension 1 of x.

    Differentiability: twice in x; a third derivative raises.  Where the norm has a corner the subgradient is zero,
    in both orders: at x_i = 0, at single zeros for p = 1, at single zeros of the second derivative for 1 < p < 2.  p
    = inf shares its gradient equally between ties. Determinism: the same bits on every run, for every batch size
    and number of threads.  Saved for backward: x and n.

    >>> rk.ops.row_norm(torch.tensor([[3.0, -4.0]]), 2).tolist()
    [5.0]
    >>> rk.ops.row_norm(torch.tensor([[3.0, -4.0]]), float("inf")).tolist()
    [4.0]
    """
    check_floating("row_norm", "x", x)
    p = float(p)
    if not p >= 1.0:
        raise ValueError(f"row_norm: p must be 1, 2, inf or any number >= 1, got {p}")
    if squared and p != 2.0:
        raise ValueError(f"row_norm: squared needs p = 2, got p = {p}")
    if x.dim() < 1:
        raise ValueError("row_norm: x must have a batch dimension, got a scalar")
    factor, weight = _split_weight(x, weight)
    unsupported = "weight requires grad" if weight is not None and weight.requires_grad else None
    if use_kernel("row_norm", impl, x, unsupported):
        rows, inner = as_rows(x)
        norm = torch.ops.robustkern.row_norm(rows, weight, inner, p, squared)
    else:
        norm = reference.row_norm(x, p, weight, squared=squared)
    return norm if factor == 1.0 else norm * (factor * factor if squared else factor)


def _split_weight(x: Tensor, weight: Tensor | float | None) -> tuple[float, Tensor | None]:
    """A weight as a factor on the whole norm, or as [C] in the accumulation dtype."""
    if weight is None:
        return 1.0, None
    if not isinstance(weight, Tensor):
        return abs(float(weight)), None
    channels = x.shape[1] if x.dim() > 1 else 1
    if weight.numel() != channels and weight.numel() != 1:
        raise ValueError(
            f"row_norm: weight must have one element or one for each of the {channels} channels of x (dimension 1), "
            f"got shape {list(weight.shape)}"
        )
    if weight.numel() > 1 and max(weight.shape) != channels:
        raise ValueError(f"row_norm: weight must vary along the channels only, got shape {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"row_norm: weight must be on {x.device} like x, got {weight.device}")
    return 1.0, weight.reshape(-1).to(accumulation_dtype(x.dtype))


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, C, ...] as rows [B, N] in the order of its memory, and how many adjacent columns share a channel.

    The order within a row does not matter, so channels_last and other permuted layouts are viewed, not copied.
    """
    if x.dim() == 1:
        return x.unsqueeze(1), 1
    if x.is_contiguous():
        return x.reshape(x.shape[0], x.shape[1:].numel()), max(x.shape[2:].numel(), 1)
    order = [0, *sorted(range(1, x.dim()), key=lambda d: (-x.stride()[d], d))]
    permuted = x.permute(order)
    inner = permuted.shape[order.index(1) + 1 :].numel()
    return permuted.reshape(x.shape[0], x.shape[1:].numel()), max(inner, 1)


def _is_flat(p: float) -> bool:
    """Whether the second derivative is identically zero."""
    return p == 1.0 or math.isinf(p)


def _register() -> None:
    ops = torch.ops.robustkern

    @register_fake("row_norm")
    def _(x, weight, inner, p, squared):  # type: ignore[no-untyped-def]
        return x.new_empty([x.shape[0]], dtype=accumulation_dtype(x.dtype))

    @register_fake("row_norm_backward")
    def _(grad, x, norm, weight, inner, p, squared):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape)

    @register_fake("row_norm_double_backward")
    def _(u, grad, x, norm, weight, inner, p, squared):  # type: ignore[no-untyped-def]
        gg_grad = x.new_empty([x.shape[0]], dtype=accumulation_dtype(x.dtype))
        return gg_grad, x.new_empty([0]) if _is_flat(p) else x.new_empty(x.shape)

    # d(grad, x) of row_norm_backward     | L1, Linf | L2, squared, Lp
    #   gg_grad = <u, dn/dx>           |    yes   |      yes
    #   grad_x  = grad d2n/dx2 u       |     0    |      yes
    register_chain("row_norm")

    register_row_vmap(ops.row_norm, (True, False, False, False, False))
    register_row_vmap(ops.row_norm_backward, (True, True, True, False, False, False, False))
    register_row_vmap(ops.row_norm_double_backward, (True, True, True, True, False, False, False, False))


if _library.extension() is not None:
    _register()
