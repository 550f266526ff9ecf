"""attack_step: one step of a gradient attack, and the way back into the ball and the box."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern.ops._attack_arguments import Rows, check_ball, check_broadcast, check_like
from robustkern.ops._register import register_fake
from robustkern.ops._samples import Sample, make_tensor
from robustkern.ops._select import accumulation_dtype, check_floating, use_kernel
from robustkern.reference.attack_step import NORMS


def attack_step(
    adversary: Tensor,  # [B, ...]
    x: Tensor,  # like adversary
    grad: Tensor | None = None,  # like adversary
    *,
    eps: Tensor | float,
    step_size: Tensor | float = 0.0,
    norm: str = "linf",
    scale: Tensor | None = None,  # [B]
    coordinates: int = 1,
    impl: str = "auto",
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

    The buffer is changed in place since it is an attack's one state, of fixed size and address: no allocation a step,
    and a CUDA graph or torch.compile (which makes the operator functional, and its copy in place again) can hold it.

    Args:
        adversary: where the attack is, [B, ...] float32, float64, float16 or bfloat16, of any layout; changed in place.
        x: the clean samples in [0, 1], the centres of the balls.
        grad: what to ascend; NaN counts as 0, and so does a sample's infinite gradient for l2.  None: projection only.
        eps: radius of the ball, in units of x; for linf also a tensor that broadcasts over a sample, such as [C, 1, 1].
        step_size: length of the step in the norm; a tensor likewise.
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
    buffer = adversary.detach()
    flat = rows.view(buffer)
    torch.ops.robustkern.attack_step(
        flat,
        rows.view(x.detach()),
        None if grad is None else rows.view(grad.detach()),
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


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _register() -> None:
    @register_fake("attack_step")
    def _(adversary, x, grad, eps, step_size, scale, inner, norm, coordinates):  # type: ignore[no-untyped-def]
        return None


if _library.extension() is not None:
    _register()


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Calls that exercise every option, shape class and layout of attack_step."""
    make, op = make_tensor(device, dtype), attack_step

    def images(*shape: int) -> Tensor:
        x = make(*shape).abs().clamp(max=1.0)
        return x - (x > 0.9) * (x - 1.0) if x.numel() else x  # some pixels at the ends

    def sample(name: str, *shape: int, grad: Tensor | None = None, **options: Any) -> Sample:
        x = images(*shape)
        near = (x + 0.1 * make(*shape)).clamp(0.0, 1.0)
        given = {"eps": 0.1, "step_size": 0.05, **options}
        return Sample(op, (near, x, make(*shape) if grad is None else grad), given, name, not x.numel())

    channels = torch.tensor([0.05, 0.1, 0.2], device=device, dtype=torch.float64).view(3, 1, 1)
    for norm, eps in (("linf", 0.1), ("l2", 0.7), ("l1", 2.0)):
        yield sample(f"{norm}", 5, 3, 4, 6, norm=norm, eps=eps, step_size=eps / 3)
        yield sample(f"{norm}, inside", 5, 3, 4, 6, norm=norm, eps=100.0, step_size=0.5)
        scale = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0], device=device, dtype=torch.float64)
        yield sample(f"{norm}, scale", 5, 3, 4, 6, norm=norm, eps=eps, step_size=eps, scale=scale)
        yield sample(f"{norm}, long rows", 2, 3, 60, 61, norm=norm, eps=10 * eps, step_size=eps, coordinates=40)
        yield sample(f"{norm}, one column", 5, 1, norm=norm, eps=eps, step_size=eps)
        yield sample(f"{norm}, no gradient", 4, 30, grad=torch.zeros(4, 30, device=device, dtype=dtype), norm=norm)
        yield sample(f"{norm}, tiny gradients", 4, 30, grad=(1e-6 * make(4, 30)), norm=norm, eps=eps)
        yield sample(f"{norm}, zero eps", 4, 30, norm=norm, eps=0.0)
    yield sample("eps a channel", 5, 3, 4, 6, eps=channels, step_size=channels / 4)
    yield sample("eps a pixel", 5, 3, 4, 6, eps=make(4, 6).abs(), step_size=0.1)
    last = sample("channels_last", 5, 3, 4, 6, eps=channels, step_size=channels / 4)
    yield Sample(op, tuple(t.to(memory_format=torch.channels_last) for t in last.inputs), last.options, last.name)
    mixed = sample("mixed layouts", 5, 3, 4, 6, norm="l2")
    layouts = (torch.channels_last, torch.contiguous_format, torch.channels_last)
    yield Sample(
        op, tuple(t.contiguous(memory_format=f) for t, f in zip(mixed.inputs, layouts)), mixed.options, mixed.name
    )
    strided = sample("strided", 5, 3, 4, 12, norm="l2")
    yield Sample(op, tuple(t[..., ::2] for t in strided.inputs), strided.options, strided.name)
    yield sample("l1, several coordinates", 5, 3, 4, 6, norm="l1", eps=2.0, step_size=1.0, coordinates=7)
    yield sample("empty batch", 0, 3, 4, 6)
