"""margin_loss: how far the best wrong class is ahead of the right one, which attacks maximise."""

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import MARGINS as KINDS
from robustkern._choices import Impl, Margin
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._chains import register_chain
from robustkern.ops._register import register_fake, register_row_vmap
from robustkern.ops._select import check_floating, use_kernel


def margin_loss(
    logits: Tensor,  # [B, C]
    target: Tensor,  # [B]
    *,
    kind: Margin = "cw",
    towards: Tensor | None = None,  # [B]
    impl: Impl = "auto",
) -> Tensor:  # [B]
    r"""loss_i = z_o - z_y (cw), or (z_o - z_y) / (z_(1) - z_(3)) (dlr); o = towards, or else the best wrong class.

    z_(1) >= z_(2) >= ... are the sorted logits.  Positive where sample i is misclassified.  With `towards`, dlr divides
    by z_(1) - (z_(3) + z_(4)) / 2.  dlr does not change if the logits are shifted or multiplied by a positive number;
    where its divisor is zero, it is zero.  One pass over the logits gives value and gradient.  Sources: Carlini and
    Wagner, IEEE S&P 2017 (cw); Croce and Hein, ICML 2020 (dlr, which is called -DLR there when it is minimised).

    Args:
        logits: [B, C] float32, float64, float16 or bfloat16; B may be 0.  C >= 2 for cw, 3 for dlr, 4 for dlr towards
            a class.
        target: y, classes.
        kind: "cw" or "dlr".
        towards: o, classes.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        [B], float32 for 16- and 32-bit logits, float64 for float64.

    Raises:
        TypeError: logits are not floating-point or target is not integer.
        ValueError: an unknown kind, shapes that do not match, or too few classes.
        RuntimeError: on the CPU, a class that does not exist.  On CUDA such a sample's loss and gradient are NaN.

    Differentiability: once in the logits; a second derivative raises.  Ties are broken by the lower class.
    Determinism: the same bits on every run and for every batch size.  Saved for backward: the gradient of each loss.

    >>> rk.ops.margin_loss(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])).tolist()  # 2 - 3
    [-1.0]
    """
    op = "margin_loss"
    check_floating(op, "logits", logits)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be 'cw' or 'dlr', got {kind!r}")
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must be [B, C], got shape {list(logits.shape)}")
    least = 2 if kind == "cw" else 3 if towards is None else 4
    if logits.shape[1] < least:
        raise ValueError(f"{op}: kind={kind!r} needs at least {least} classes, got {logits.shape[1]}")
    for name, classes in (("target", target), ("towards", towards)):
        if classes is None:
            continue
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(f"{op}: {name} must be integer classes, got {classes.dtype}")
        if list(classes.shape) != [logits.shape[0]]:
            raise ValueError(f"{op}: {name} must have shape {[logits.shape[0]]}, got {list(classes.shape)}")
    target, towards = target.long(), None if towards is None else towards.long()
    if not use_kernel(op, impl, logits):
        return reference.margin_loss(logits, target, kind=kind, towards=towards)
    loss, _ = torch.ops.robustkern.margin_loss(logits, target, towards, KINDS.index(kind))
    return loss


def _register() -> None:
    ops = torch.ops.robustkern

    @register_fake("margin_loss")
    def _(logits, target, towards, kind):  # type: ignore[no-untyped-def]
        loss = logits.new_empty([logits.shape[0]], dtype=accumulation_dtype(logits.dtype))
        return loss, logits.new_empty(logits.shape)

    @register_fake("margin_loss_backward")
    def _(grad, slopes):  # type: ignore[no-untyped-def]
        return slopes.new_empty(slopes.shape)

    # The second derivative in the logits is zero for cw, but not for dlr, and the slopes do not tell.
    register_chain("margin_loss")
    register_row_vmap(ops.margin_loss, (True, True, True, False))
    register_row_vmap(ops.margin_loss_backward, (True, True))


if _library.extension() is not None:
    _register()
