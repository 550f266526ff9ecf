"""Training methods by name: each entry makes a loss `(model, x, y, draw) -> Terms` from its options.

A new method is a new entry: the configuration, the command line and the checkpoints take its options from here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn

from robustkern import Draw, Terms, losses
from robustkern._choices import Impl
from robustkern._text import brief
from robustkern.attacks import FGSM, NFGSM, PGD
from robustkern.data import Images
from robustkern.losses.projected_penalty import ProjectedPenalty

from .config import parse_fraction
from .errors import UsageError, require
from .weights import load_model, load_model_for

Loss = Callable[[nn.Module, Tensor, Tensor, Draw | None], Terms]
Attack = FGSM | NFGSM | PGD

_RISE = "mean of ℓ(x′) − ℓ(x)"


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        options: Its options and their defaults. The types of the defaults are the types of the options.
        build: Makes the loss of all options but `awp` and `every`: `build(eps=..., impl=..., **options)`.
        smoothness: What its smoothness term is, for the axis of a figure; None if it has none.
        single_step: Whether it trains on single-step attacks, which can overfit to them catastrophically.
        check: Refuses options that do not fit the images or classes: `check(data, **options)`.

    >>> from robustkern.training import METHODS
    >>> METHODS["trades"].options["steps"], METHODS["fgsm"].single_step
    (10, True)
    """

    options: dict[str, Any]
    build: Callable[..., Loss]
    smoothness: str | None = None
    single_step: bool = False
    check: Callable[..., None] | None = None

    def complete(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """All options, the missing ones from the defaults; unknown names and wrong types are refused."""
        for unknown in sorted(map(brief, set(options) - set(self.options))):
            known = ", ".join(self.options) or "none"
            raise UsageError(f"method {name} has no option {unknown} (it has: {known})")
        completed = {}
        for option, default in self.options.items():
            value = options.get(option, default)
            try:
                completed[option] = _converted(value, type(default))
            except (TypeError, UsageError) as error:
                expected = f"option {option} of method {name} must be {_KINDS[type(default)]}"
                raise UsageError(f"{expected}, got {brief(repr(value))}") from error
        return completed


_KINDS: dict[type, str] = {str: "a text", bool: "true or false", int: "an integer", float: "a number"}


def _converted(value: Any, kind: type) -> Any:
    """The value as that type. A number may be a text, as the command line gives it; TypeError for anything else."""
    if kind in (str, bool):
        if not isinstance(value, kind):
            raise TypeError
        return value
    if isinstance(value, str):
        value = parse_fraction(value)
    if not isinstance(value, Real) or isinstance(value, bool) or (kind is int and not float(value).is_integer()):
        raise TypeError
    return kind(value)


def _standard(*, eps: float, **options: Any) -> Loss:
    return losses.CrossEntropy(**options)


def _label_smoothing(*, eps: float, **options: Any) -> Loss:
    return losses.LabelSmoothing(**options)


def _distillation(*, eps: float, impl: Impl, teacher: str, temperature: float) -> Loss:
    require(bool(teacher), "method distillation needs the option teacher: the run directory of a trained network")
    return losses.Distillation(load_model(teacher)[0], temperature, impl=impl)


def _check_teacher(data: Images, *, teacher: str, **options: Any) -> None:
    load_model_for(teacher, data)


def _gradient_penalty(*, norm: float, **options: Any) -> Loss:
    require(norm >= 1, f"norm must be 1, 2, inf or another p >= 1, got {norm:g}")
    return losses.GradientPenalty(p=norm, **options)


def _adversarial(
    kind: Callable[..., Attack], *, eps: float, impl: Impl, weight: float, label_smoothing: float, **options: Any
) -> Loss:
    return losses.AdversarialTraining(kind(eps, impl=impl, **options), weight, label_smoothing, impl)


def _alp(*, eps: float, impl: Impl, weight: float, **options: Any) -> Loss:
    return losses.ALP(PGD(eps, impl=impl, **options), weight, impl)


def _projected(penalty: type[ProjectedPenalty], *, projections: int, **options: Any) -> Loss:
    return penalty(projections=projections or "exact", **options)


def _check_projections(data: Images, *, projections: int, law: str, **options: Any) -> None:
    most = data.num_classes
    require(
        law != "orthonormal" or projections <= most,
        f"projections must be at most {most} for law orthonormal and the {most} classes of {data.name}, got "
        f"{projections}; 0 is the exact norm",
    )


def _projected_method(penalty: type[ProjectedPenalty], weight: float, smoothness: str) -> Method:
    options = {
        "weight": weight, "projections": 1, "law": "orthonormal", "every": 1, "fraction": 1.0, "label_smoothing": 0.0
    }  # fmt: skip
    return Method(options, partial(_projected, penalty), smoothness, check=_check_projections)


_STEPS = {"steps": 10, "step_size": 0.0, "awp": 0.0}
_MIXED = {"weight": 1.0, "label_smoothing": 0.0, "awp": 0.0}

METHODS: dict[str, Method] = {
    "standard": Method({"label_smoothing": 0.0, "temperature": 1.0}, _standard),
    "label-smoothing": Method({"weight": 0.1}, _label_smoothing, "mean of −log p over the classes"),
    "distillation": Method(
        {"teacher": "", "temperature": 100.0},
        _distillation,
        check=_check_teacher,
    ),
    "fgsm": Method(
        {"step_size": 0.0, **_MIXED},
        partial(_adversarial, FGSM),
        _RISE,
        single_step=True,
    ),
    "n-fgsm": Method(
        {"step_size": 0.0, "noise": 2.0, **_MIXED},
        partial(_adversarial, NFGSM),
        _RISE,
        single_step=True,
    ),
    "pgd": Method({**_STEPS, **_MIXED}, partial(_adversarial, PGD), _RISE),
    "trades": Method(
        {"weight": 6.0, **_STEPS},
        losses.TRADES,
        "mean of KL(p(x) ‖ p(x′))",
    ),
    "mart": Method(
        {"weight": 5.0, **_STEPS},
        losses.MART,
        "mean of (1 − p_y) KL(p(x) ‖ p(x′))",
    ),
    "alp": Method(
        {"weight": 0.5, **_STEPS},
        _alp,
        "mean of ‖z(x) − z(x′)‖²",
    ),
    "vat": Method(
        {"weight": 1.0, "xi": 1.0, "steps": 1, "awp": 0.0, "every": 1},
        partial(losses.VAT, norm="linf"),
        "mean of KL(p(x) ‖ p(x + r))",
    ),
    "gradient-penalty": Method(
        {"weight": 1.0, "norm": 1.0, "label_smoothing": 0.0, "estimator": "exact", "h": 0.1, "every": 1},
        _gradient_penalty,
        "mean of ‖eps · ∂ℓ/∂x‖",
    ),
    "jacobian": _projected_method(losses.JacobianPenalty, 3.0, "mean of ‖eps · J‖²"),
    "fisher": _projected_method(
        losses.FisherPenalty,
        30.0,
        "mean of eps² · tr FIM",
    ),
    "cross-lipschitz": _projected_method(
        losses.CrossLipschitz,
        10.0,
        "mean of ‖eps · (∂z_l − ∂z_m)/∂x‖²",
    ),
    "llr": Method(
        {"weight": 4.0, "ratio": 0.75, **_STEPS, "steps": 2, "every": 1},
        losses.LocalLinearity,
        "mean of |ℓ(x + δ) − ℓ(x) − δ·∇ℓ| + |δ·∇ℓ| ratio",
    ),
    "cure": Method(
        {"weight": 4.0, "label_smoothing": 0.0, "every": 1},
        losses.CURE,
        "mean of ‖∇ℓ(x + z) − ∇ℓ(x)‖²",
    ),
    "gradalign": Method(
        {"weight": 0.2, "step_size": 0.0, "awp": 0.0},
        losses.GradAlign,
        "mean of 1 − cos(∇ℓ(x), ∇ℓ(x + η))",
        single_step=True,
    ),
}


def build_loss(name: str, options: dict[str, Any], *, eps: float, impl: str) -> Loss:
    """The loss of a method.

    Args:
        name: A name of `METHODS`.
        options: Its options; those left out take the method's defaults.
        eps: Radius of the perturbations that it should withstand, in units of the images.
        impl: "auto", "kernel" or "reference".

    >>> from robustkern.training import build_loss
    >>> build_loss("gradient-penalty", {"weight": 2.0}, eps=8 / 255, impl="auto").weight
    2.0
    """
    method = _method(name)
    try:
        given = method.complete(name, options)
        awp, every = given.pop("awp", 0.0), given.pop("every", 1)
        if given.get("step_size") == 0:  # the attack's own
            given["step_size"] = None
        loss = method.build(eps=eps, impl=impl, **given)
        loss = losses.AWP(loss, awp) if awp else loss
        return loss if every == 1 else losses.Lazy(loss, every)
    except UsageError:
        raise
    except ValueError as error:  # an option that the loss or its attack refuses
        raise UsageError(f"method {name}: {error}") from error


def check_options(name: str, options: dict[str, Any], data: Images) -> None:
    """Raises UsageError if the options of a method do not fit the images or classes that it will be trained on."""
    method = _method(name)
    if method.check is not None:
        method.check(data, **method.complete(name, options))


def _method(name: str) -> Method:
    require(name in METHODS, f"no method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
