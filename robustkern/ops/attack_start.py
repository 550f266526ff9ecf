"""attack_start: a random point in the ball around each sample."""

import torch
from torch import Tensor

from robustkern import _library, reference
from robustkern._choices import NORMS, Impl, Norm
from robustkern.ops._attack_arguments import Rows, check_ball, check_broadcast
from robustkern.ops._register import register_fake
from robustkern.ops._select import check_floating, use_kernel
from robustkern.reference.random_cotangents import draw_seed


def attack_start(
    x: Tensor,  # [B, ...]
    *,
    eps: Tensor | float,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    samples: Tensor | None = None,  # [B]
    restart: int = 0,
    impl: Impl = "auto",
) -> Tensor:  # like x
    r"""x'_i = clamp(x_i + u_i, 0, 1), u_i uniform in {||u|| <= eps}.

    linf: independent entries; l2: a normal direction, l1: a Laplace one, both of length eps v^(1/N) with v uniform in
    (0, 1) and N the entries of a sample.  Bytes moved: x once, the result once.

    Args:
        x: the clean samples in [0, 1], [B, ...] float32, float64, float16 or bfloat16, of any layout.
        eps: radius of the ball; for linf also a tensor that broadcasts over a sample, such as [C, 1, 1].
        norm: "linf", "l2" or "l1".
        generator: source of the seed if none is given; on the device of x.  None: the default one.
        seed: one int64 on the device of x, [1].
        samples: number of each sample, int64: its start depends on the seed, this number and `restart`, not on its
            place in the batch.  None: 0, 1, 2, ...
        restart: number of the start, 0 <= restart < 2^31; another number gives another start.
        impl: "auto" (the kernel if there is one), "kernel" or "reference".

    Returns:
        Like x, in its layout; in the ball and the box, as precisely as for `attack_step`.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: an unknown norm, an eps that does not fit, a seed that is not one int64, samples that are not one
            int64 each, or another device.

    Differentiability: none; results have no history.  Determinism: Philox4x32-10, keyed by the seed and counted by
    entry (of the contiguous sample, whatever the layout), sample and restart: the same bits on every run and for any
    number of threads; for linf also on CPU and CUDA, where l1 and l2 agree to rounding.  Saved for backward: nothing.

    >>> x = torch.full((2, 3), 0.5)
    >>> start = rk.ops.attack_start(x, eps=0.25)
    >>> bool((start - x).abs().max() <= 0.25)
    True
    """
    op = "attack_start"
    check_floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have a batch dimension, got a scalar")
    check_ball(op, norm, eps)
    if isinstance(eps, Tensor) and eps.numel() != 1:
        check_broadcast(op, "eps", eps, x.shape[1:])
    if not 0 <= restart < 2**31:
        raise ValueError(f"{op}: restart must be in [0, 2^31), got {restart}")
    if seed is None:
        if generator is not None and generator.device.type != x.device.type:
            raise ValueError(f"{op}: generator must be on {x.device} like x, got {generator.device}")
        seed = draw_seed(x, generator)
    for name, value, shape in (("seed", seed, [1]), ("samples", samples, [len(x)])):
        if value is not None and (value.dtype != torch.int64 or list(value.shape) != shape or value.device != x.device):
            raise ValueError(
                f"{op}: {name} must be {shape} int64 on {x.device} like x, got {list(value.shape)} "
                f"{str(value.dtype).removeprefix('torch.')} on {value.device}"
            )
    if not use_kernel(op, impl, x):
        return reference.attack_start(x, eps=eps, norm=norm, seed=seed, samples=samples, restart=restart)
    start = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = Rows(start)
    torch.ops.robustkern.attack_start(
        rows.view(start),
        rows.view(x.detach()),
        rows.table(op, "eps", eps, x),
        seed,
        samples,
        rows.inner,
        NORMS.index(norm),
        restart,
    )
    # Random numbers are counted in contiguous order; the attack goes on in the layout of x.
    return start if x.is_contiguous() else torch.empty_like(x).copy_(start)


def _register() -> None:
    @register_fake("attack_start")
    def _(adversary, x, eps, seed, samples, inner, norm, restart):  # type: ignore[no-untyped-def]
        return None


if _library.extension() is not None:
    _register()
