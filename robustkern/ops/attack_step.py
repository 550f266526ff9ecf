"""attack_step: one step of a gradient attack, and the way back into the ball and the box."""

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import NORMS, Impl, Norm
from robustkern._dtypes import accumulation_dtype
from robustkern.ops._attack_arguments import Rows, check_ball, check_broadcast, check_like
from robustkern.ops._register import register_fake
from robustkern.ops._select import check_floating, use_kernel


def attack_step(
    adversary: Tensor,  # [B, ...]
    x: Tensor,  # like adversary
    grad: Tensor | None = None,  # like adversary
    *,
    eps: Tensor | float,
    step_size: Tensor | float = 0.0,
    norm: Norm = "linf",
    scale: Tensor | None = None,  # [B]
    coordinates: int = 1,
    impl: Impl = "auto",
) -> Tensor:  # adversary
    r"""x'_i <- P(x'_i + s_i step_size d(g_i)), in place: P projects on {||x' - x_i|| <= eps} and on [0, 1].

    d is the steepest ascent in the norm, of length 1:
      linf  d = sign(g)
      l2    d = g / ||g||_2
      l1    d = sign(g) / k at the k coordinates with the largest |g| (more where there are ties), of those that are not
            at an end of [0, 1] already and pushed further
    P is the nearest point of ball and box for linf and l1; for l2, the nearest point of the ball, clamped.  Bytes
    moved: adversary, x and grad once for linf, twice for l2, and adversary once more to write; for l1 they are read
    again for every trial of its threshold, from the cache.

    The buffer is changed in place since it is an attack's one state, of fixed size and address: no allocation per step,
    and a CUDA graph or torch.compile (which makes the operator functional, and its copy in place again) can hold it.

    Args:
        adversary: where the attack is, [B, ...] float32, float64, float16 or bfloat16, of any layout; changed in place.
        x: the clean samples in [0, 1], the centres of the balls.
        grad: what to ascend; NaN counts as 0, and so does a sample's infinite gradient for l2.  None: projection only.
        eps: radius of the ball, in units of x; for linf also a tensor that broadcasts over a sample, such as [C, 1, 1].
        step_size: length of the step in the norm; may be a tensor, like eps.
        norm: "linf", "l2" or "l1".
        scale: s, a factor on each sample's step; of any floating-point dtype.  None: 1.
        coordinates: k, for l1.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        adversary.  In [0, 1] and in the ball: for linf to within half a unit in the last place of float32 or float64,
        for l1 and l2 to within the rounding of the norm; 16-bit values are rounded to the nearest one that is inside.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: an unknown norm, shapes, dtypes or devices that do not match, coordinates < 1, or an eps with more
            than one element for l1 or l2.

    Differentiability: none; results have no history.  Determinism: the same bits on every run, for every batch size
    and number of threads.  Saved for backward: nothing.

    >>> x = torch.full((1, 2), 0.5)
    >>> rk.ops.attack_step(x.clone(), x, torch.tensor([[1.0, -2.0]]), eps=0.25, step_size=1.0).tolist()
    [[0.75, 0.25]]
    """
    op = "attack_step"
    check_floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have a batch dimension, got a scalar")
    check_ball(op, norm, eps)
    check_like(op, "adversary", adversary, x)
    if grad is not None:
        check_like(op, "grad", grad, x)
    if scale is not None and (scale.shape != x.shape[:1] or scale.device != x.device):
        raise ValueError(f"{op}: scale must be {[len(x)]} on {x.device}, got {list(scale.shape)} on {scale.device}")
    if coordinates < 1:
        raise ValueError(f"{op}: coordinates must be at least 1, got {coordinates}")
    for name, value in (("eps", eps), ("step_size", step_size)):
        if isinstance(value, Tensor) and value.numel() != 1:
            check_broadcast(op, name, value, x.shape[1:])
    if not use_kernel(op, impl, x):
        return reference.attack_step(
            adversary, x, grad, eps=eps, step_size=step_size, norm=norm, scale=scale, coordinates=coordinates
        )
    rows = Rows(adversary)
    buffer = _detached(adversary)
    flat = rows.view(buffer)
    torch.ops.robustkern.attack_step(
        flat,
        rows.view(_detached(x)),
        None if grad is None else rows.view(_detached(grad)),
        rows.table(op, "eps", eps, x),
        rows.table(op, "step_size", step_size, x),
        None if scale is None else scale.detach().to(accumulation_dtype(x.dtype)),
        rows.inner,
        NORMS.index(norm),
        coordinates,
    )
    if not rows.is_view(buffer):
        buffer.copy_(flat.view([x.shape[d] for d in rows.order]).permute(_inverse(rows.order)))
    elif not torch.compiler.is_compiling() and not adversary.is_inference():
        torch.autograd.graph.increment_version(adversary)
    return adversary


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _register() -> None:
    @register_fake("attack_step")
    def _(adversary, x, grad, eps, step_size, scale, inner, norm, coordinates):  # type: ignore[no-untyped-def]
        return None


if _library.extension() is not None:
    _register()
