"""attack_step in plain PyTorch."""

import torch
from torch import Tensor

from robustkern._choices import Norm
from robustkern._dtypes import accumulation_dtype


def attack_step(
    adversary: Tensor,  # [B, ...], changed in place
    x: Tensor,  # like adversary
    grad: Tensor | None = None,  # like adversary
    *,
    eps: Tensor | float,
    step_size: Tensor | float = 0.0,
    norm: Norm = "linf",
    scale: Tensor | None = None,  # [B]
    coordinates: int = 1,
) -> Tensor:  # adversary
    """x' = P(x' + step_size * direction(grad)); see `robustkern.ops.attack_step`.

    >>> x = torch.full((1, 2), 0.5)
    >>> rk.reference.attack_step(x.clone(), x, torch.tensor([[1.0, -2.0]]), eps=0.25, step_size=1.0).tolist()
    [[0.75, 0.25]]
    """
    dtype = accumulation_dtype(x.dtype)
    rows = (-1,) + (1,) * (x.dim() - 1)
    with torch.no_grad():
        moved, clean = adversary.to(dtype), x.to(dtype)
        eps, step = as_number(eps, clean), as_number(step_size, clean)
        if scale is not None:
            step = step * scale.to(dtype).view(rows)
        if grad is not None:
            finite = _finite(grad.to(dtype))
            if norm == "linf":
                direction = finite.sign()
            else:
                direction = _unit(finite) if norm == "l2" else _largest(finite, moved, coordinates)
            moved = moved + step * direction
        if norm == "linf":
            low, high = (clean - eps).clamp(min=0.0), (clean + eps).clamp(max=1.0)
            moved = moved.clamp(low, high)
        elif norm == "l2":
            difference = moved - clean
            length = torch.linalg.vector_norm(difference.flatten(1), dim=1).view(rows)
            moved = torch.where(length > eps, clean + eps / length * difference, moved).clamp(0.0, 1.0)
            low, high = torch.minimum(moved, clean), torch.maximum(moved, clean)
        else:
            moved = _project_l1(moved, clean, eps)
            low, high = torch.minimum(moved, clean), torch.maximum(moved, clean)
        return adversary.copy_(round_between(moved, low, high, x.dtype))


def as_number(value: Tensor | float, like: Tensor) -> Tensor:
    """The value as a tensor of the dtype and on the device of `like`."""
    return value.to(like) if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


def round_between(value: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of `dtype` nearest to `value` within [low, high], 0 <= low: rounding to 16 bits may leave the ball."""
    rounded = value.to(dtype)
    if rounded.dtype == value.dtype:
        return rounded
    # Neighbours that are not negative differ by one as integers; one number of `dtype` lies in [low, high]: x.
    steps = (rounded.to(low.dtype) < low).to(torch.int16) - (rounded.to(low.dtype) > high).to(torch.int16)
    return (rounded.view(torch.int16) + steps).view(dtype)


def _finite(grad: Tensor) -> Tensor:
    """grad with 0 for NaN, which gives no direction."""
    return torch.where(grad.isnan(), 0.0, grad)


def _unit(grad: Tensor) -> Tensor:
    """grad / ||grad||_2 for each sample; 0 where that is 0 or infinite."""
    flat = grad.flatten(1)
    largest = flat.abs().amax(1, keepdim=True) if flat.shape[1] else flat.sum(1, keepdim=True)
    scaled = flat / largest
    unit = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), unit, 0.0).view(grad.shape)


def _largest(grad: Tensor, adversary: Tensor, coordinates: int) -> Tensor:
    """sign(grad) / k at the k coordinates with the largest |grad| among those that the box does not stop."""
    if grad[0:1].numel() == 0:
        return grad
    free = torch.where(grad > 0, adversary < 1.0, adversary > 0.0)
    size = torch.where(free, grad.abs(), 0.0).flatten(1)
    least = size.topk(min(coordinates, size.shape[1]), dim=1).values[:, -1:]
    chosen = ((size >= least) & (size > 0.0)).view(grad.shape)
    count = chosen.flatten(1).sum(1).clamp(min=1).view((-1,) + (1,) * (grad.dim() - 1))
    return torch.where(chosen, grad.sign(), 0.0) / count


def _project_l1(moved: Tensor, clean: Tensor, eps: Tensor) -> Tensor:
    """The nearest point with ||. - clean||_1 <= eps in the box: |d_i| = min(max(|v_i| - t, 0), room_i)."""
    v = (moved - clean).flatten(1)
    size, flat = v.abs(), clean.flatten(1)
    room = torch.where(v > 0, 1.0 - flat, flat)
    radius = eps.reshape(1, 1)

    def shrunk(t: Tensor) -> Tensor:
        return torch.minimum((size - t).clamp(min=0.0), room)

    low = torch.zeros_like(size[:, :1])
    high = size.amax(1, keepdim=True) if size.shape[1] else low
    outside = shrunk(low).sum(1, keepdim=True) > radius
    for _ in range(64 if size.dtype == torch.float64 else 32):
        middle = (low + high) / 2
        above = shrunk(middle).sum(1, keepdim=True) > radius
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    t = torch.where(outside, high, 0.0)
    result = torch.where(t > 0, flat + v.sign() * (size - t).clamp(min=0.0), moved.flatten(1))  # x + (x' - x) rounds
    wall = (v > 0).to(v.dtype)  # exactly on it, so that the next step recognises it
    return torch.where(size - t >= room, wall, result).view(moved.shape).clamp(0.0, 1.0)
