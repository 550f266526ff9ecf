"""softmax_cross_entropy: the loss of each sample, its gradient and its Hessian-vector product."""

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import Impl
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._chains import register_chain
from robustkern.ops._register import register_fake, register_row_vmap
from robustkern.ops._select import check_floating, use_kernel


def softmax_cross_entropy(
    logits: Tensor,  # [B, C] or [B, C, d1, ...]
    target: Tensor,  # [B] or [B, d1, ...] classes; or probabilities, shaped like logits
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # [B] or [B, d1, ...]
    r"""loss_i = -sum_c q_ic log softmax(z_i / T)_c, with q = (1 - s) target + s / C.

    Same values as `torch.nn.functional.cross_entropy(reduction="none")`, whose second backward moves 25 logits-sized
    tensors through memory; this one moves 3.  Stable for logits of any size.  Sums run in float32 for 16- and 32-bit
    logits and in float64 for float64.

    Args:
        logits: [B, C] or [B, C, d1, ...] float32, float64, float16 or bfloat16; B may be 0.
        target: class indices (integers) or probabilities (floating point, not differentiated by the kernel, need
            not sum to one).
        label_smoothing: s in [0, 1].
        ignore_index: samples of this class have loss and gradient zero.
        temperature: T > 0; gradients include the factor 1 / T.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        [B] (or [B, d1, ...]), float32 for 16- and 32-bit logits, float64 for float64.

    Raises:
        TypeError: logits or target have the wrong dtype.
        ValueError: shapes do not match, s is outside [0, 1] or T is not positive.
        RuntimeError: on the CPU, a target class that does not exist.  On CUDA such a sample's loss is NaN, since
            reporting it would stop the device.

    Differentiability: twice in the logits; a third derivative raises.  Determinism: the same bits on every run and
    for every batch size. Saved for backward: logits, target and two numbers a row (the maximum and the log of the
    sum).

    >>> logits, target = torch.zeros(2, 4), torch.tensor([0, 3])
    >>> rk.ops.softmax_cross_entropy(logits, target).exp().round(decimals=3).tolist()
    [4.0, 4.0]
    """
    op = "softmax_cross_entropy"
    check_floating(op, "logits", logits)
    if logits.dim() < 2:
        raise ValueError(f"{op}: logits must be [B, C] or [B, C, ...], got shape {list(logits.shape)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not temperature > 0.0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    indices = not target.is_floating_point()
    if target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{op}: target must be integer classes or floating-point probabilities, got {target.dtype}")
    expected = [logits.shape[0], *logits.shape[2:]] if indices else list(logits.shape)
    if list(target.shape) != expected:
        kind = "classes" if indices else "probabilities"
        raise ValueError(
            f"{op}: target {kind} must have shape {expected} for logits of shape {list(logits.shape)}, "
            f"got {list(target.shape)}"
        )
    target = target.long() if indices else target
    unsupported = "target requires grad" if target.requires_grad else None
    if not use_kernel(op, impl, logits, unsupported):
        return reference.softmax_cross_entropy(
            logits, target, label_smoothing=label_smoothing, ignore_index=ignore_index, temperature=temperature
        )
    if not indices and target.dtype not in (logits.dtype, accumulation_dtype(logits.dtype)):
        target = target.to(accumulation_dtype(logits.dtype))
    rows = logits if logits.dim() == 2 else logits.movedim(1, -1).reshape(-1, logits.shape[1])
    flat = target.reshape(-1) if indices else target.movedim(1, -1).reshape(rows.shape)
    loss, _ = torch.ops.robustkern.softmax_cross_entropy(
        rows, flat, float(label_smoothing), float(temperature), ignore_index
    )
    return loss.reshape([logits.shape[0], *logits.shape[2:]])


def _register() -> None:
    ops = torch.ops.robustkern

    @register_fake("softmax_cross_entropy")
    def _(logits, target, label_smoothing, temperature, ignore_index):  # type: ignore[no-untyped-def]
        dtype = accumulation_dtype(logits.dtype)
        return logits.new_empty([logits.shape[0]], dtype=dtype), logits.new_empty([logits.shape[0], 2], dtype=dtype)

    @register_fake("softmax_cross_entropy_backward")
    def _(grad, logits, statistics, target, label_smoothing, temperature, ignore_index):  # type: ignore[no-untyped-def]
        return logits.new_empty(logits.shape)

    @register_fake("softmax_cross_entropy_double_backward")
    def _(u, grad, logits, statistics, target, label_smoothing, temperature, ignore_index):  # type: ignore[no-untyped-def]
        return logits.new_empty([logits.shape[0]], dtype=accumulation_dtype(logits.dtype)), logits.new_empty(
            logits.shape
        )

    # d(grad, logits) of softmax_cross_entropy_backward, the statistics being functions of the logits:
    #   gg_grad     = <u, d loss / d z>      yes
    #   grad_logits = grad d2 loss / dz2 u   yes
    register_chain("softmax_cross_entropy")

    options = (False, False, False)
    register_row_vmap(ops.softmax_cross_entropy, (True, True, *options))
    register_row_vmap(ops.softmax_cross_entropy_backward, (True, True, True, True, *options))
    register_row_vmap(ops.softmax_cross_entropy_double_backward, (True, True, True, True, True, *options))


if _library.extension() is not None:
    _register()
