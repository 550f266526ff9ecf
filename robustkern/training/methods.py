"""Training methods by name: each entry makes a loss `(model, x, y) -> Terms` from its options.

A new method is a new entry: the configuration, the command line and the checkpoints take its options from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from robustkern import Terms, losses
from robustkern.losses.projected_penalty import ProjectedPenalty
from robustkern.ops.random_cotangents import LAWS

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
        single_step: Whether it trains on single-step attacks, which can overfit to them catastrophically.
    """

    summary: str
    options: dict[str, Any]
    build: Callable[..., Loss]
    smoothness: str | None = None
    single_step: bool = False

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


def _projected(
    penalty: type[ProjectedPenalty],
    *,
    eps: float,
    impl: str,
    weight: float,
    projections: int,
    law: str,
    every: int,
    fraction: float,
    label_smoothing: float,
) -> Loss:
    _require(0 <= label_smoothing < 1, f"label smoothing must be in [0, 1), got {label_smoothing:g}")
    _require(0 <= weight < float("inf"), f"weight must not be negative, got {weight:g}")
    _require(projections >= 0, f"projections must be 1 or more, or 0 for the exact norm, got {projections}")
    _require(law in LAWS, f"no law {law!r}: choose one of {', '.join(LAWS)}")
    _require(every >= 1, f"every must be at least 1, got {every}")
    _require(0 < fraction <= 1, f"fraction must be in (0, 1], got {fraction:g}")
    return penalty(
        weight=weight, projections=projections or "exact", eps=eps, law=law, every=every, fraction=fraction,
        label_smoothing=label_smoothing, impl=impl,
    )  # fmt: skip


def _projected_method(summary: str, penalty: type[ProjectedPenalty], weight: float, smoothness: str) -> Method:
    options = {
        "weight": weight, "projections": 1, "law": "orthonormal", "every": 1, "fraction": 1.0, "label_smoothing": 0.0
    }  # fmt: skip
    return Method(summary, options, partial(_projected, penalty), smoothness)


METHODS: dict[str, Method] = {
    "standard": Method("cross-entropy alone", {"label_smoothing": 0.0}, _standard),
    "gradient-penalty": Method(
        "cross-entropy and the norm of its input gradient",
        {"weight": 1.0, "norm": 1.0, "label_smoothing": 0.0},
        _gradient_penalty,
        smoothness="mean of ‖eps · ∂ℓ/∂x‖",
    ),
    "jacobian": _projected_method(
        "cross-entropy and the norm of the logits' Jacobian", losses.JacobianPenalty, 3.0, "mean of ‖eps · J‖²"
    ),
    "fisher": _projected_method(
        "cross-entropy and the trace of the Fisher information in the input",
        losses.FisherPenalty,
        30.0,
        "mean of eps² · tr FIM",
    ),
    "cross-lipschitz": _projected_method(
        "cross-entropy and the Jacobian norm of the logits' differences",
        losses.CrossLipschitz,
        10.0,
        "mean of ‖eps · (∂z_l − ∂z_m)/∂x‖²",
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
