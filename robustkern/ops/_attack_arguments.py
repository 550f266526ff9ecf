"""What attack_step and attack_start have in common: the ball, and tensors as rows in the order of memory."""

import torch
from torch import Tensor

from robustkern._choices import NORMS
from robustkern._dtypes import accumulation_dtype


class Rows:
    """Samples [B, ...] as rows [B, N] in the order of the memory of the first tensor given."""

    def __init__(self, like: Tensor) -> None:
        dims = range(1, like.dim())
        self._in_order = like.is_contiguous()
        self.order = [0, *(dims if self._in_order else sorted(dims, key=lambda d: (-like.stride()[d], d)))]
        self.shape = [like.shape[0], like.shape[1:].numel()]
        self.sample_shape = like.shape[1:]
        channel = self.order.index(1) if like.dim() > 1 else 0
        # Adjacent columns that share a channel.
        self.inner = max(1, torch.Size(like.shape[d] for d in self.order[channel + 1 :]).numel())

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor as [B, N]: a view where its memory has this order, else a copy."""
        ordered = tensor if self._in_order else tensor.permute(self.order)
        return ordered.reshape(self.shape).contiguous()

    def is_view(self, tensor: Tensor) -> bool:
        """Whether `view` makes no copy."""
        return (tensor if self._in_order else tensor.permute(self.order)).is_contiguous()

    def table(self, op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
        """One number for all columns [1], for each channel [C], or for each column [N] in the order of memory."""
        dtype = accumulation_dtype(like.dtype)
        if not isinstance(value, Tensor):
            return torch.full([1], float(value), dtype=dtype, device=like.device)
        value = value.detach().to(device=like.device, dtype=dtype)
        if value.numel() == 1:
            return value.reshape(1)
        check_broadcast(op, name, value, self.sample_shape)
        value = value.reshape((1,) * (len(self.sample_shape) - value.dim()) + tuple(value.shape))
        if value.numel() == value.shape[0]:
            return value.reshape(-1).contiguous()
        full = value.expand(self.sample_shape)
        return full.permute([d - 1 for d in self.order[1:]]).reshape(-1)


def check_broadcast(op: str, name: str, value: Tensor, sample_shape: torch.Size) -> None:
    """Raises ValueError unless `value` broadcasts over a sample."""
    shape = tuple(value.shape)
    aligned = zip(reversed(shape), reversed(sample_shape))
    if len(shape) > len(sample_shape) or any(v not in (1, s) for v, s in aligned):
        raise ValueError(
            f"{op}: {name} must be a number or broadcast over a sample of shape {list(sample_shape)}, got shape "
            f"{list(shape)}; one value a channel is {name}.view(-1{', 1' * (len(sample_shape) - 1)})"
        )


def check_ball(op: str, norm: str, eps: Tensor | float) -> None:
    """Raises ValueError unless (norm, eps) describes a ball."""
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if norm != "linf" and isinstance(eps, Tensor) and eps.numel() != 1:
        raise ValueError(f"{op}: eps must be one number for norm {norm!r}, got shape {list(eps.shape)}")


def check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises ValueError unless the tensor has the shape, dtype and device of x."""
    if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device:
        kinds = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (x, tensor)]
        raise ValueError(f"{op}: {name} must be {kinds[0]} like x, got {kinds[1]}")
