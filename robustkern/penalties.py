"""Penalties on derivatives with respect to the input, as functions of (outputs, inputs)."""

import torch
from torch import Tensor

from robustkern._choices import Impl
from robustkern._input_gradient import check_differentiable, check_graph, check_tensors, input_gradient
from robustkern.double_backward import fused_where_possible
from robustkern.ops.row_norm import row_norm


def gradient_norm(
    loss: Tensor,  # [B]
    x: Tensor,  # [B, ...]
    p: float = 2.0,
    *,
    weight: Tensor | float | None = None,
    squared: bool = False,
    create_graph: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:  # [B]
    r"""||w * d loss_i / d x_i||_p for each sample i.

    The sum of the losses is differentiated: each sample gets its own gradient, which does not shrink as the batch
    grows.  In a model that mixes the samples of a batch, such as one with BatchNorm in training mode, the other
    samples' losses contribute too.

    To penalise it, add a multiple of its mean to the loss and call backward.  The second derivative is exact, and fused
    for the operators that `robustkern.install()` replaces, whether that was called or not.  (GroupNorm, RMSNorm, SiLU
    and Mish are fused only if the forward pass, too, ran after `install()` or within
    `robustkern.fused_double_backward()`, as it does in `robustkern.losses`.)  A parameter that the penalty does not
    depend on, such as the last bias, gets no gradient from it: if no other term gives one, `.grad` is None, not zeros.

    For robustness to perturbations bounded in the l_q norm take the dual p = q / (q - 1): Linf -> p = 1, L2 -> p = 2.

    Args:
        loss: one loss per sample, [B], computed from x by differentiable operations (reduction="none").
        x: the inputs, a leaf that requires grad, [B, ...] float32, float64, float16 or bfloat16.
        p: 1, 2, inf or any number >= 1.
        weight: a number or one value per channel, such as eps / std.
        squared: the squared norm; p = 2 only.
        create_graph: whether the result can be differentiated; by default, whether grad mode is on.
        impl: "auto", "kernel" or "reference", as for `robustkern.ops.row_norm`.

    Returns:
        [B], float32 (float64 for float64 x).

    Raises:
        TypeError: x or loss is not a floating-point tensor.
        ValueError: x does not require grad, loss is not [B], loss does not depend on x, or its graph was detached.
        RuntimeError: the model was compiled from outside (torch.compile of the model alone): its gradient cannot be
            differentiated again.

    Differentiability: once more in the parameters and x if `create_graph`.  Determinism: as deterministic as the
    model's own backward. Source: Drucker and LeCun, "Double backpropagation increasing generalization performance",
    1991; Lyu et al., "A unified gradient regularization family for adversarial examples", 2015.

    >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
    >>> losses = x.square().sum(1) / 2  # whose gradient is x
    >>> rk.gradient_norm(losses, x, p=2).tolist()
    [5.0, 1.0]
    >>> rk.gradient_norm(losses, x, p=1).mean().backward()
    >>> x.grad.tolist()
    [[0.5, 0.5], [0.0, 0.5]]
    """
    differentiable = torch.is_grad_enabled() if create_graph is None else create_graph
    _check(loss, x)
    with torch.enable_grad(), fused_where_possible(impl):
        grad = input_gradient("gradient_norm", "loss", loss.sum(), x, create_graph=differentiable)
    if differentiable:
        check_differentiable("gradient_norm", "loss", grad)
    with torch.set_grad_enabled(differentiable):
        return row_norm(grad, p, weight, squared=squared, impl=impl)


def _check(loss: Tensor, x: Tensor) -> None:
    check_tensors("gradient_norm", x, loss=loss)
    if x.dim() == 0 or loss.shape != x.shape[:1]:
        raise ValueError(
            f"gradient_norm: loss must hold one value per sample, shape {list(x.shape[:1])} for x of shape "
            f"{list(x.shape)}, got {list(loss.shape)}: use reduction='none'"
        )
    check_graph("gradient_norm", "loss", loss)
