"""The Jacobian of a model's outputs with respect to its inputs, and its norms, by random projection or exact."""

import math
from collections.abc import Iterable
from typing import Literal, overload

import torch
from torch import Tensor

from robustkern._arguments import check_choice, check_generator, check_integer, check_number
from robustkern._basis import basis_cotangents, unit_cotangents
from robustkern._choices import IMPLS, KINDS, LAWS, REDUCTIONS, Impl, Kind, Law, Reduction
from robustkern._input_gradient import check_differentiable, check_outputs, input_gradient
from robustkern.double_backward import folds, fused_where_possible
from robustkern.ops.random_cotangents import random_cotangents
from robustkern.ops.row_norm import row_norm

Projections = int | Literal["exact"]


@overload
def jacobian_norm(
    outputs: Tensor, x: Tensor, projections: Projections = 1, *, law: Law = ..., kind: Kind = ...,
    weight: Tensor | float | None = ..., squared: bool = ..., reduction: Reduction = ...,
    generator: torch.Generator | None = ..., first: int = ..., return_variance: Literal[False] = ...,
    create_graph: bool | None = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def jacobian_norm(
    outputs: Tensor, x: Tensor, projections: Projections = 1, *, law: Law = ..., kind: Kind = ...,
    weight: Tensor | float | None = ..., squared: bool = ..., reduction: Reduction = ...,
    generator: torch.Generator | None = ..., first: int = ..., return_variance: Literal[True],
    create_graph: bool | None = ..., impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def jacobian_norm(
    outputs: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, ...]
    projections: Projections = 1,
    *,
    law: Law = "orthonormal",
    kind: Kind = "plain",
    weight: Tensor | float | None = None,
    squared: bool = True,
    reduction: Reduction = "none",
    generator: torch.Generator | None = None,
    first: int = 0,
    return_variance: bool = False,
    create_graph: bool | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""mean_k ||J_i^T w_ik||_2^2 ~ ||J_i||_F^2 for each sample i, with J_i = d outputs_i / d x_i and random w_ik.

    Unbiased for every law and every number K of projections; exact for "exact" and for K = D orthonormal ones, where D
    is the number of outputs of a sample.  `kind` chooses among three quantities of this form:

        plain    ||J||_F^2                                   Jacobian regularisation
        centred  ||(I - 11^T/C) J||_F^2                      C/2 times the cross-Lipschitz sum over pairs / C^2
        fisher   tr(J^T (diag p - p p^T) J), p = softmax     the trace of the Fisher information in the input

    With A = J J^T (M J J^T M^T for the other kinds), the variance of one sample's estimate is 1/K times

        sphere       2 D / (D + 2) (||A||_F^2 - (tr A)^2 / D)
        orthonormal  (D - K) / (D - 1) times that
        gaussian     2 ||A||_F^2
        rademacher   2 (||A||_F^2 - sum_c A_cc^2)

    and that of a batch's mean is B times smaller still: one projection is enough for training.  Each projection takes
    one backward pass, and another in the backward pass of the result: a step with K of them takes the time of 1 + K
    plain steps, and K times the memory for activations.  If `robustkern.install()` was in force when a network of
    convolutions, linear layers, BatchNorm, LayerNorm, RMSNorm, ReLU, GELU, SiLU, Mish and, on the CPU, attention ran,
    the K passes become one, in which every operator works on all cotangents at once (on the CPU, if BatchNorm and ReLU
    see at most K MiB).

    To penalise it, add a multiple of its mean to the loss and call backward; see `gradient_norm` for what is fused.
    In a model that mixes the samples of a batch, such as one with BatchNorm in training mode, other samples contribute
    too, by J_ji = d outputs_j / d x_i: `batch_coupling` measures how much.  Random projections, which differ from
    sample to sample, then estimate sum_j ||J_ji||_F^2, while "exact", whose basis is the same for all samples, gives
    ||sum_j J_ji||_F^2.  There, K = D is not exact, and the variance is larger than these formulas say.

    Args:
        outputs: [B, C] or [B, C, d1, ...] (dense prediction), computed from x by differentiable operations.
        x: the inputs, a leaf that requires grad, [B, ...] float32, float64, float16 or bfloat16.
        projections: K, or "exact" for the sum over a basis, which takes D of them ((C - 1) D / C for centred and
            fisher).
        law: of the projections: "orthonormal" (K <= D), "sphere", "gaussian" or "rademacher"; see
            `robustkern.ops.random_cotangents`.
        kind: "plain", "centred" or "fisher", as above; fisher is differentiated through p too.
        weight: a number or one value per channel of x, such as eps / std: the norm of J diag(weight).
        squared: False for the square root of the estimate, which is biased (downwards) unless it is exact.
        reduction: "none" [B], "mean" or "sum" over the batch.
        generator: source of the projections, on the device of outputs; None: the default one, the only one that
            torch.compile can trace.
        first: position of the first row in a larger batch: every row gets the projections that it has there.
        return_variance: also return an unbiased estimate of the estimate's variance, from the spread of the K values:
            s^2 / K, with (1 - K / D) for "orthonormal", where s^2 has the divisor K - 1.  It needs K >= 2 and
            `squared`, and assumes that a sample's outputs depend on no other sample, see above.  Not differentiable.
        create_graph: whether the result can be differentiated; by default, whether grad mode is on.
        impl: "auto", "kernel" or "reference".

    Returns:
        [B] or a scalar, float32 (float64 for float64 x); with return_variance a pair of them.

    Raises:
        TypeError: x or outputs is not a floating-point tensor.
        ValueError: x does not require grad, outputs are not [B, C, ...], do not depend on x, or their graph was
            detached; an option that is none of the above; K > D for "orthonormal".
        RuntimeError: the model was compiled from outside, see `gradient_norm`.

    Differentiability: once more in the parameters and x if `create_graph`; where a Jacobian vanishes, its derivative is
    zero, even if not `squared`. Determinism: given the generator's state, as deterministic as the model's own backward.
    Source: Hoffman, Roberts and Yaida, "Robust learning with Jacobian regularization", 2019 (sphere).

    >>> x = torch.rand(2, 3, requires_grad=True)
    >>> rk.jacobian_norm(2 * x, x, "exact", create_graph=False).tolist()  # J = 2 I
    [12.0, 12.0]
    >>> estimate, variance = rk.jacobian_norm(x.square(), x, 2, reduction="mean", return_variance=True)
    >>> estimate.backward()
    >>> x.grad.shape
    torch.Size([2, 3])
    """
    function = "jacobian_norm"
    differentiable = torch.is_grad_enabled() if create_graph is None else create_graph
    exact = projections == "exact"
    check_outputs(function, outputs, x)
    if not exact:
        check_integer(function, "projections", projections, 1, 'or "exact"')
    check_choice(function, "law", law, LAWS)
    check_choice(function, "kind", kind, KINDS)
    check_choice(function, "reduction", reduction, REDUCTIONS)
    if return_variance and not squared:
        raise ValueError("jacobian_norm: return_variance needs squared=True: the root of an estimate is biased")
    size = outputs.shape[1:].numel()
    if return_variance and projections == 1 and not (law == "orthonormal" and size == 1):
        raise ValueError("jacobian_norm: return_variance needs at least two projections: one value has no spread")
    check_choice(function, "impl", impl, IMPLS)
    check_generator(function, generator, outputs.device)
    check_integer(function, "first", first, 0)
    if weight is not None and not isinstance(weight, Tensor):
        check_number(function, "weight", weight, -math.inf)
    with torch.enable_grad(), fused_where_possible(impl):
        source = outputs if differentiable else outputs.detach()
        count = size if exact else int(projections)
        if exact:
            cotangents: Iterable[Tensor] = basis_cotangents(source, kind)
        else:
            # A row's projections depend on its place in the whole batch: zeros stand in for the rows before these.
            padded = torch.cat([source.new_zeros(first, *source.shape[1:]), source]) if first else source
            cotangents = random_cotangents(padded, count, law=law, kind=kind, generator=generator, impl=impl)
            cotangents = cotangents[:, first:] if first else cotangents
        fold = differentiable and folds(outputs, x, count, impl)

        def gradient(cotangent: Tensor) -> Tensor:
            return input_gradient(function, "outputs", outputs, x, cotangent, create_graph=differentiable)

        def norms(grads: Tensor) -> Tensor:
            return row_norm(grads, 2.0, weight, squared=squared, impl=impl)

        if fold:
            batch = cotangents if isinstance(cotangents, Tensor) else torch.stack(list(cotangents))
            grads = torch.func.vmap(gradient)(batch)  # [K, *x.shape]
            check_differentiable(function, "outputs", grads)
            stacked = norms(grads.flatten(0, 1)).unflatten(0, grads.shape[:2]).t()  # [B, K]
        else:
            values: list[Tensor] = []
            for cotangent in cotangents:
                grad = gradient(cotangent)
                if differentiable and not values:
                    check_differentiable(function, "outputs", grad)
                with torch.set_grad_enabled(differentiable):
                    values.append(norms(grad))
            with torch.set_grad_enabled(differentiable):
                stacked = torch.stack(values, 1)
    with torch.set_grad_enabled(differentiable):
        if squared:
            norm = stacked.sum(1) if exact else stacked.mean(1)
        else:  # row_norm, unlike a square root, has no infinite slope at zero
            norm = row_norm(stacked, 2.0, 1.0 if exact else stacked.shape[1] ** -0.5, impl=impl)
        norm = _reduce(norm, reduction)
    if not return_variance:
        return norm
    return norm, _variance(stacked.detach(), outputs, exact, law, reduction)


def _variance(values: Tensor, outputs: Tensor, exact: bool, law: Law, reduction: Reduction) -> Tensor:
    """The variance of the mean of each row of values [B, K]."""
    batch, count = values.shape
    size = outputs.shape[1:].numel()
    if exact or (law == "orthonormal" and count == size):
        variance = values.new_zeros(batch)
    else:
        # The D values of a whole frame have a constant sum, so any two have the covariance -Var / (D - 1), as if drawn
        # without replacement: hence the correction for a finite population.
        variance = values.var(1) / count * (1 - count / size if law == "orthonormal" else 1.0)
    variance = _reduce(variance, "sum" if reduction == "mean" else reduction)
    return variance / batch**2 if reduction == "mean" else variance


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()


def suggest_projections(
    estimate: Tensor,
    variance: Tensor,
    relative_error: float,
    *,
    projections: int,
    dimensions: int,
    law: Law = "orthonormal",
) -> int:
    r"""The least K for which sqrt(sum Var_K / sum estimate^2) <= relative_error.

        estimate, variance = jacobian_norm(outputs, x, 4, reduction="mean", return_variance=True)
        suggest_projections(estimate, variance, 0.05, projections=4, dimensions=outputs[0].numel())

    With reduction="mean", the left side is the standard deviation of a batch's mean, relative to it; with
    reduction="none", it is the root mean square over the samples.  K is itself an estimate, from the given variance:
    use a batch that is not too small.

    Args:
        estimate: from `jacobian_norm(..., return_variance=True)`, with any reduction.
        variance: likewise.
        relative_error: the target, > 0.
        projections: the K of that call.
        dimensions: D, the number of outputs of a sample; for law="orthonormal", the answer is never larger.
        law: that of the projections.

    Returns:
        K as an int; getting it waits for the device.

    Raises:
        ValueError: the projections were exact and so show no variance, relative_error is not positive, or estimate and
            variance are not finite or differ in shape.

    Differentiability: none. Determinism: complete.

    >>> estimate, variance = torch.tensor(10.0), torch.tensor(1.0)  # of 2 projections: an error of a tenth
    >>> rk.suggest_projections(estimate, variance, 0.06, projections=2, dimensions=1000, law="sphere")
    6
    """
    function, orthonormal = "suggest_projections", law == "orthonormal"
    check_choice(function, "law", law, LAWS)
    check_number(function, "relative_error", relative_error, 0, open_below=True)
    check_integer(function, "projections", projections, 1)
    check_integer(function, "dimensions", dimensions, 1)
    if estimate.shape != variance.shape:
        raise ValueError(
            f"{function}: variance must have the shape of estimate, {list(estimate.shape)}, got {list(variance.shape)}"
        )
    if projections < 2 or (orthonormal and projections >= dimensions):
        raise ValueError(
            f"suggest_projections: {projections} projections by the law {law!r} in {dimensions} dimensions show no "
            "variance: take 2 or more, and fewer than there are dimensions if they are orthonormal"
        )
    # On average, the square of an estimate is too large by its variance, which for values >= 0 never exceeds it.
    squares, variances = (float(t.sum()) for t in (estimate.detach().double().square(), variance.detach().double()))
    if not math.isfinite(squares) or not math.isfinite(variances):
        raise ValueError(f"{function}: estimate and variance must be finite, got {estimate} and {variance}")
    wanted = relative_error**2 * (squares - variances if squares > variances else squares)
    # s^2, where Var_K = s^2 / K, or s^2 / K (1 - K / D) for orthonormal projections
    spread = variances * projections / (1 - projections / dimensions if orthonormal else 1)
    if spread == 0:
        return 1
    if squares == 0:
        raise ValueError(f"{function}: no number of projections gives an estimate of zero a relative error")
    least = wanted + spread / dimensions if orthonormal else wanted
    return max(1, math.ceil(spread / least - 1e-9) if spread < least * 2.0**62 else 2**62)


def input_jacobian(
    outputs: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, ...]
    *,
    create_graph: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:  # [B, C, ..., *x.shape[1:]]
    r"""J_i = d outputs_i / d x_i for each sample, by one backward pass for each of the D outputs of a sample.

    Exact, as long as a sample's outputs depend on no other sample: see `batch_coupling`.

    Args:
        outputs: [B, C] or [B, C, d1, ...], computed from x by differentiable operations.
        x: the inputs, a leaf that requires grad.
        create_graph: whether the result can be differentiated; by default, whether grad mode is on.
        impl: "auto", "kernel" or "reference": whether its derivative is fused.

    Returns:
        [B, *outputs.shape[1:], *x.shape[1:]] in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as `jacobian_norm`.

    Differentiability: once more in the parameters and x if `create_graph`. Determinism: as deterministic as the
    model's own backward.

    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> rk.input_jacobian(x.square(), x).tolist()
    [[[2.0, 0.0], [0.0, 4.0]]]
    """
    differentiable = torch.is_grad_enabled() if create_graph is None else create_graph
    check_outputs("input_jacobian", outputs, x)
    rows = []
    with torch.enable_grad(), fused_where_possible(impl):
        for cotangent in unit_cotangents(outputs.detach()):
            rows.append(input_gradient("input_jacobian", "outputs", outputs, x, cotangent, create_graph=differentiable))
            if differentiable and len(rows) == 1:
                check_differentiable("input_jacobian", "outputs", rows[0])
    with torch.set_grad_enabled(differentiable):
        return torch.stack(rows, 1).reshape(*outputs.shape, *x.shape[1:])
