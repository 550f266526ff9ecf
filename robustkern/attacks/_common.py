"""What every attack does: put the model into eval mode, check the arguments, ascend a loss, keep the best result."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustkern import _late, ops
from robustkern._choices import AttackObjective, Impl, Norm
from robustkern._classifier import check_call, check_largest, check_least, check_logits, gradient_of
from robustkern._dtypes import accumulation_dtype
from robustkern._sharded import is_sharded

Model = Callable[[Tensor], Tensor]


@contextmanager
def attacked(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The model as an attack must see it: in eval mode, so that BatchNorm is fixed, and with no parameter gradients.

    Every module's mode, every parameter's requires_grad and every buffer that a forward pass may write into is put back
    on the way out, whatever happened inside.  Modules of torch.nn in eval mode, such as BatchNorm, leave their buffers
    alone: those are not copied, only watched.  A function that is not an `nn.Module` is called as it is, and so is an
    exported program, which has one mode.

    Raises:
        RuntimeError: A buffer that is only watched was written into, by something other than its module.

    >>> from robustkern.attacks import attacked
    >>> model = nn.Sequential(nn.Linear(6, 3), nn.Dropout()).train()
    >>> with attacked(model):
    ...     print(model.training, model[0].weight.requires_grad)
    False False
    >>> model.training
    True
    """
    seen = model if isinstance(model, nn.Module) else nn.Module()
    modes = [(module, module.training) for module in seen.modules()]
    # FSDP2 takes the flag for that of its weights for good. Frozen or not, no gradient in a parameter is asked for.
    frozen = () if is_sharded(seen) else seen.parameters()
    flags = [(parameter, parameter.requires_grad) for parameter in frozen]
    buffers: list[tuple[Tensor, int | None, Tensor]] = []
    fixed: list[tuple[Tensor, int | None]] = []
    try:
        _evaluating(seen)
        with torch.no_grad():
            for buffer, writable in _buffers(seen):
                if writable:
                    buffers.append((buffer, _version(buffer), buffer.clone()))
                else:
                    fixed.append((buffer, _version(buffer)))
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
        if any(_version(buffer) != version for buffer, version in fixed):
            raise RuntimeError(
                "attacked: the model must not write into buffers of torch.nn's modules that are in eval mode, which "
                "are not put back: give it buffers of its own"
            )
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


def _buffers(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Every buffer, and whether a forward pass can write into it: a module of torch.nn in eval mode does not."""
    writable: dict[int, tuple[Tensor, bool]] = {}
    for module in model.modules():
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        writes = module.training or hooked or not type(module).__module__.startswith("torch.nn.modules.")
        for buffer in module.buffers(recurse=False):
            writable[id(buffer)] = buffer, writes or writable.get(id(buffer), (buffer, False))[1]
    yield from writable.values()


def _evaluating(module: nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # from a module that torch.export made, which may be part of the model
        for child in module.children():
            _evaluating(child)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def box_diameter(norm: Norm, shape: Sequence[int]) -> float:
    """The largest distance between two images of a shape with values in [0, 1]."""
    entries = math.prod(shape)
    return {"linf": 1.0, "l2": entries**0.5, "l1": float(entries)}[norm]


def check_batch(
    name: str,
    model: Model,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    indices: Tensor | None = None,
    *,
    eps: Tensor | float = 0.0,
    norm: Norm = "linf",
    soft: bool = False,
) -> tuple[Model, Tensor, Tensor]:
    """The model, with a check on its logits; x and y as an attack needs them: detached and no inference tensors.

    With `soft`, y may be probabilities.

    Raises:
        TypeError: x is not floating-point, y is not integer, or another argument is of a wrong type.
        ValueError: x is not in [0, 1], y or indices do not match its samples, y are not classes, or no two images are
            eps apart.
    """
    y = check_call(name, model, x, y, generator, soft=soft)
    if indices is not None:
        if not isinstance(indices, Tensor):
            raise TypeError(f"{name}: indices must be a tensor, got {type(indices).__name__}")
        if indices.dtype != torch.int64 or indices.shape != y.shape[:1] or indices.device != x.device:
            raise ValueError(
                f"{name}: indices must be {list(y.shape[:1])} int64 on {x.device} like x, got {list(indices.shape)} "
                f"{str(indices.dtype).removeprefix('torch.')} on {indices.device}"
            )
    widest = box_diameter(norm, x.shape[1:])
    if norm != "linf" and float(eps) > widest * (1 + 1e-6):
        raise ValueError(
            f"{name}: eps must be at most {widest:g}, the {norm} diameter of the box of {list(x.shape[1:])} images in "
            f"[0, 1], got {eps}"
        )
    x, y = x.detach(), y.detach()
    numbers = _Numbers(name, x, y)

    # DistributedDataParallel itself would wait for parameter gradients that never come.
    bare = model.module if isinstance(model, DistributedDataParallel) else model

    def checked(images: Tensor) -> Tensor:
        logits = bare(images)
        check_logits(name, logits, len(images))
        if y.is_floating_point() and y.shape[1:] != logits.shape[1:]:
            raise ValueError(f"{name}: y must be probabilities of {logits.shape[1]} classes, got {list(y.shape)}")
        numbers.check(logits.shape[1])
        return logits

    with torch.inference_mode(False):
        return checked, (x.clone() if x.is_inference() else x), (y.clone() if y.is_inference() else y)


class _Numbers:
    """What an attack was called with, as far as only its numbers tell: on the CPU at once, else one call late.

    Until then labels that are no classes count as the nearest one that is, rather than stop the device for good.
    """

    def __init__(self, name: str, x: Tensor, y: Tensor) -> None:
        self.name, self.classes = name, 0
        self.largest: int | None = None
        self.shape = list(x.shape)
        if not x.numel() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        labels = y.new_zeros(1) if y.is_floating_point() else y  # probabilities are no numbers of classes
        ends = [end.double() for end in (*torch.aminmax(x), *torch.aminmax(labels))]
        if _late.must_wait(x):
            _calls[name] = _calls.get(name, 0) + 1
            self.name = f"{name}, call {_calls[name]}"
            _late.check_late(torch.stack(ends), self._late)
        else:
            low, high, least, largest = (end.item() for end in ends)
            self.largest = int(largest)
            self._check(low, high, least)

    def check(self, classes: int) -> None:
        """Raises unless the labels are among the classes, as soon as they are known."""
        self.classes = classes
        if self.largest is not None:
            check_largest(self.name, self.largest, classes)

    def _late(self, numbers: list[float]) -> None:
        *ends, largest = numbers
        self._check(*ends)
        if self.classes:
            check_largest(self.name, int(largest), self.classes)

    def _check(self, low: float, high: float, least: float) -> None:
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"{self.name}: x must be in [0, 1], got values from {low:.9g} to {high:.9g}; clamp what rounding left "
                "outside, and put the normalisation into the model (robustkern.models.Normalize), so that eps is in "
                "units of the image"
            )
        check_least(self.name, int(least))


_calls: dict[str, int] = {}  # of attacks on a device, by name


def losses_of(
    kind: AttackObjective, logits: Tensor, y: Tensor, towards: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """What an untargeted attack maximises for each sample: [B]."""
    if _late.must_wait(y) and not y.is_floating_point():
        y = y.clamp(0, logits.shape[1] - 1)
    if kind == "ce":
        logits = logits.to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="none")
    return ops.margin_loss(logits, y, kind=kind, towards=towards, impl=impl)


def evaluate(
    name: str,
    model: Model,
    adversary: Tensor,
    y: Tensor,
    loss: AttackObjective,
    *,
    need_grad: bool,
    targeted: bool = False,
    towards: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, fooled, gradient of the loss) at the adversary: what the attack maximises, whether it has won already.

    A NaN loss counts as the attacker's success.
    """
    with torch.enable_grad() if need_grad else torch.no_grad():
        leaf = adversary.detach().requires_grad_(need_grad)
        logits = model(leaf)
        value = losses_of(loss, logits, y, towards, impl)
        value = -value if targeted else value
        grad = gradient_of(name, value, leaf) if need_grad else None
    value, named = value.detach(), logits.argmax(1)
    y = y.argmax(1) if y.is_floating_point() else y
    return value, (named == y if targeted else named != y) | value.isnan(), grad


class Attack:
    """The call that all attacks share."""

    eps: float | Tensor
    norm: Norm

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        *,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Adversarial examples for a batch.

        Args:
            model: Maps images to logits [B, C >= 2]; any callable.  A module is left unchanged, and its parameters get
                no gradients.
            x: Clean images in [0, 1].  [B, C, H, W]
            y: Their labels, or the targets; of any integer dtype.  [B]  For loss "ce" also probabilities of the
                classes, of which the likeliest is the one that an adversary must leave.  [B, C]
            generator: Source of the random starts, on the device of x; by default PyTorch's own.
            indices: Numbers of the samples, [B] int64, such as their places in the data: a sample's starts depend on
                the generator and its number, not on its place in the batch.  By default 0, 1, 2, ...

        Returns:
            Images within reach of x and in [0, 1], without gradient history, in the layout of x.  [B, C, H, W]

        Raises:
            TypeError: An argument of another type or dtype.
            ValueError: x outside [0, 1], y that are not among the classes, outputs that are not logits or do not depend
                on x.
        """
        name = type(self).__name__
        soft = getattr(self, "loss", "") == "ce" and isinstance(y, Tensor) and y.dim() > 1
        logits, x, y = check_batch(name, model, x, y, generator, indices, eps=self.eps, norm=self.norm, soft=soft)
        with torch.inference_mode(False), attacked(model):
            return self._search(logits, x, y, generator, indices)

    def _search(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None, indices: Tensor | None
    ) -> Tensor:
        """The adversaries for checked arguments."""
        raise NotImplementedError


class Best:
    """The best adversary of each sample so far: one that fools the model, and among those the one of highest loss."""

    def __init__(self, x: Tensor) -> None:
        self.adversary = x.clone()
        self.loss: Tensor | None = None
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(self, adversary: Tensor, loss: Tensor, fooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Takes in one adversary for each sample, or for the samples `rows`; returns which were better.  [rows]"""
        if self.loss is None:
            self.loss = torch.full([len(self.fooled)], -torch.inf, dtype=loss.dtype, device=loss.device)
        best_loss, best_fooled = (t if rows is None else t[rows] for t in (self.loss, self.fooled))
        # Not `loss > best_loss` alone: NaN is the attacker's success, and compares false.
        better = (fooled > best_fooled) | ((fooled == best_fooled) & ((loss > best_loss) | loss.isnan()))
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
