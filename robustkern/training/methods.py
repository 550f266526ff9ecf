"""Training methods by name: each entry makes a loss `(model, x, y) -> Terms` from its options.

A new method is a new entry: the configuration, the command line and the checkpoints take its options from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robustkern import Terms, losses

from .errors import UsageError

Loss = Callable[[nn.Module, Tensor, Tensor], Terms]


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        summary: One line for tables and help texts.
        options: Its options and their defaults. The types of the defaults are the types of the options.
        build: Makes the loss: `build(eps=..., impl=..., **options)`.
        smoothness: What its smoothness term is, for the axis of a figure; None if it has none.
    """

    summary: str
    options: dict[str, Any]
    build: Callable[..., Loss]
    smoothness: str | None = None

    def complete(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """All options, the missing ones from the defaults; unknown names and wrong types are refused."""
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise UsageError(f"method {name} has no option {unknown[0]} (it has: {known})")
        completed = {}
        for option, default in self.options.items():
            value = options.get(option, default)
            try:
                completed[option] = type(default)(value)
            except (TypeError, ValueError) as error:
                kind = type(default).__name__
                raise UsageError(f"option {option} of method {name} must be a {kind}, got {value!r}") from error
        return completed


def _standard(*, eps: float, impl: str, label_smoothing: float) -> Loss:
    _require(0 <= label_smoothing < 1, f"label smoothing must be in [0, 1), got {label_smoothing:g}")
    return losses.CrossEntropy(label_smoothing=label_smoothing, impl=impl)


def _gradient_penalty(*, eps: float, impl: str, weight: float, norm: float, label_smoothing: float) -> Loss:
    _require(0 <= label_smoothing < 1, f"label smoothing must be in [0, 1), got {label_smoothing:g}")
    _require(norm >= 1, f"norm must be 1, 2, inf or another p >= 1, got {norm:g}")
    _require(0 <= weight < float("inf"), f"weight must not be negative, got {weight:g}")
    return losses.GradientPenalty(weight=weight, p=norm, eps=eps, label_smoothing=label_smoothing, impl=impl)


METHODS: dict[str, Method] = {
    "standard": Method("cross-entropy alone", {"label_smoothing": 0.0}, _standard),
    "gradient-penalty": Method(
        "cross-entropy and the norm of its input gradient",
        {"weight": 1.0, "norm": 1.0, "label_smoothing": 0.0},
        _gradient_penalty,
        smoothness="mean of ‖eps · ∂ℓ/∂x‖",
    ),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def build_loss(name: str, options: dict[str, Any], *, eps: float, impl: str) -> Loss:
    """The loss of a method.

    Args:
        name: A name of `METHODS`.
        options: Its options; those left out take the method's defaults.
        eps: Radius of the perturbations it should stand, in units of the images.
        impl: "auto", "kernel" or "reference".
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    return method.build(eps=eps, impl=impl, **method.complete(name, options))
