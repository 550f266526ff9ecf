"""What every attack does: see the model as it is used, check its arguments, ascend a loss, keep the best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustkern import ops
from robustkern.reference.attack_step import NORMS

LOSSES = ("ce", "cw", "dlr")


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """The model as an attack must see it: in eval mode, so that BatchNorm is fixed, and with no parameter gradients.

    Every module's mode, every parameter's requires_grad and every buffer is put back on the way out, whatever happened
    inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.no_grad():
        buffers = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        # Module by module: train() would recurse and turn on what its owner had frozen.
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if version is None or _version(buffer) != version:
                    buffer.copy_(value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def bare(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel, which would wait for parameter gradients that never come."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_options(
    name: str,
    eps: Tensor | float,
    norm: str,
    loss: str,
    losses: tuple[str, ...] = LOSSES,
    step_size: Tensor | float | None = None,
    **counts: int,
) -> None:
    """Raises ValueError, naming the attack, unless its options make sense."""
    if norm not in NORMS:
        raise ValueError(f"{name}: norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if loss not in losses:
        raise ValueError(f"{name}: loss must be one of {', '.join(map(repr, losses))}, got {loss!r}")
    if min(counts.values(), default=1) < 1:
        values = " and ".join(str(v) for v in counts.values())
        raise ValueError(f"{name}: {' and '.join(counts)} must be at least 1, got {values}")
    check_eps(name, eps)
    shape = list(torch.as_tensor(eps).shape)
    if norm != "linf" and math.prod(shape) != 1:
        raise ValueError(f"{name}: eps must be one number for norm {norm!r}, got shape {shape}")
    if step_size is not None and not bool((torch.as_tensor(step_size) > 0).all()):
        raise ValueError(f"{name}: step_size must be positive, got {step_size}")


def check_eps(name: str, eps: float | Tensor) -> None:
    """Raises ValueError unless the radius, or each of them, is a number that is not negative."""
    if isinstance(eps, str) or not bool((torch.as_tensor(eps) >= 0).all()):
        raise ValueError(f"{name}: eps must not be negative or NaN, got {eps}")


def check_batch(name: str, x: Tensor, y: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x and y as an attack works on them: without history, and not of inference mode.

    Raises:
        TypeError: x is not floating-point or y is not integer.
        ValueError: x is not in [0, 1], or y or indices do not count its samples.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating-point images in [0, 1], got {x.dtype}; divide bytes by 255")
    if y.is_floating_point() or y.is_complex():
        raise TypeError(f"{name}: y must be integer classes, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{name}: y must have shape {list(x.shape[:1])}, got {list(y.shape)}")
    if indices is not None and (indices.dtype != torch.int64 or indices.shape != x.shape[:1]):
        raise ValueError(
            f"{name}: indices must be {list(x.shape[:1])} int64, got {list(indices.shape)} {indices.dtype}"
        )
    x, y = x.detach(), y.detach()
    if x.numel() and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        low, high = (float(v) for v in torch.aminmax(x))
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"{name}: x must be in [0, 1], got values from {low:g} to {high:g}; put the normalisation into the "
                "model (robustkern.models.Normalize), so that eps is in units of the image"
            )
    with torch.inference_mode(False):
        return (x.clone() if x.is_inference() else x), (y.clone() if y.is_inference() else y)


def losses_of(kind: str, logits: Tensor, y: Tensor, towards: Tensor | None = None, impl: str = "auto") -> Tensor:
    """What an untargeted attack maximises for each sample: [B]."""
    if kind == "ce":
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y, reduction="none")
    return ops.margin_loss(logits, y, kind=kind, towards=towards, impl=impl)


def evaluate(
    model: nn.Module,
    adversary: Tensor,
    y: Tensor,
    loss: str,
    *,
    need_grad: bool,
    targeted: bool = False,
    towards: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, fooled, gradient of the loss) at the adversary: what the attack maximises, whether it has won already.

    A loss that is NaN is the attacker's success.
    """
    with torch.enable_grad() if need_grad else torch.no_grad():
        leaf = adversary.detach().requires_grad_(need_grad)
        logits = model(leaf)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"attack: the model must give logits [{len(y)}, classes], got {got}")
        value = losses_of(loss, logits, y, towards, impl)
        value = -value if targeted else value
        grad = torch.autograd.grad(value.sum(), leaf)[0] if need_grad else None
    value, hit = value.detach(), logits.detach().argmax(1) == y
    return value, (hit if targeted else ~hit) | value.isnan(), grad


class Best:
    """The best adversary of each sample so far: one that fools the model, and among those the one of highest loss."""

    def __init__(self, x: Tensor) -> None:
        self.adversary = x.clone()
        self.loss: Tensor | None = None
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(self, adversary: Tensor, loss: Tensor, fooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Takes in one adversary for each sample, or for the samples `rows`; which of them were better.  [rows]"""
        if self.loss is None:
            self.loss = torch.full([len(self.fooled)], -torch.inf, dtype=loss.dtype, device=loss.device)
        best_loss, best_fooled = (t if rows is None else t[rows] for t in (self.loss, self.fooled))
        # Not `loss > best_loss` alone: NaN is the attacker's success, and compares false.
        better = (fooled & ~best_fooled) | ((fooled == best_fooled) & ((loss > best_loss) | loss.isnan()))
        loss, fooled = torch.where(better, loss, best_loss), fooled | best_fooled
        mask = better.view(-1, *[1] * (adversary.dim() - 1))
        if rows is None:
            torch.where(mask, adversary, self.adversary, out=self.adversary)
            self.loss, self.fooled = loss, fooled
        else:
            self.adversary[rows] = torch.where(mask, adversary, self.adversary[rows])
            self.loss[rows], self.fooled[rows] = loss, fooled
        return better


def keep_rows(rows: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """The given rows of each tensor; None stays None."""
    return tuple(None if t is None else t[rows] for t in tensors)
