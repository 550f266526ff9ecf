"""Checks for what makes a measured robustness untrue; a sound model and evaluation pass each of them.

A robust accuracy is an upper bound: an attack that fails says nothing. These checks look for the known reasons why
attacks fail on models that are not robust (Athalye et al., Obfuscated gradients give a false sense of security, ICML
2018; Carlini et al., On evaluating adversarial robustness, 2019; the flags of AutoAttack, Croce and Hein 2020), and for
mistakes of the evaluation itself. Training with penalties on gradients is a known way to make gradients small without
making a model robust, so a package that does so has to look hard.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern import ops
from robustkern._choices import Threat
from robustkern.attacks import FGSM, PGD, attacked
from robustkern.attacks._common import box_diameter

_FLAT = 1e-8  # an input gradient with no entry above this counts as zero
_FEW_POINTS = 0.01  # by chance, an attack that should be weaker may come out stronger by this much
_LOSSES_DIFFER = 0.1  # other losses, and more steps, may make this much difference on sound models too


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: Short name, the key in the report.
        passed: Whether nothing suspicious was seen.
        finding: One sentence: what was seen.
        values: The numbers behind it.

    >>> from robustkern.evaluation import Check
    >>> Check("gradients", True, "every image has one").passed
    True
    """

    name: str
    passed: bool
    finding: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is checked: a model in eval mode, and samples of which it classifies at least some correctly.

    Attributes:
        model: Maps images to logits.
        x: Images in [0, 1].  [B, C, H, W]
        y: Their labels.  [B]
        eps: Radius of the attack whose results are to be trusted.
        norm: Its norm.
        steps: Steps of the iterative attacks that the checks run.
        seed: Seed of the random starts.
        reported: Share of the samples that are reported to withstand every attack; None if PGD was the only one.

    >>> from robustkern.evaluation import Subject
    >>> Subject(nn.Flatten(), torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), eps=0.1).steps
    20
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    norm: Threat = "linf"
    steps: int = 20
    seed: int = 0
    reported: float | None = None

    def accuracy(self, attack: Callable[..., Tensor], model: nn.Module | None = None) -> float:
        """Share of the samples that the model still classifies right when `model` (None: itself) is attacked."""
        adversary = attack(self.model if model is None else model, self.x, self.y, self._generator())
        return self.clean(adversary)

    def clean(self, x: Tensor | None = None) -> float:
        """Share of the samples classified right."""
        return float(correct(self.model, self.x if x is None else x, self.y).float().mean())

    def pgd(self, **options: Any) -> PGD:
        """The iterative attack; `options` replace its own."""
        usual = {"eps": self.eps, "norm": self.norm, "steps": self.steps, "early_exit": True}
        return PGD(**{**usual, **options})

    def noise(self) -> Tensor:
        """Whether each sample is still classified right at all of 20 random points of the ball."""
        right = correct(self.model, self.x, self.y)
        generator = self._generator()
        for _ in range(20):
            moved = ops.attack_start(self.x, eps=self.eps, norm=self.norm, generator=generator)
            if self.norm == "linf":  # at a corner, where a linear function takes its extremes
                moved = (self.x + self.eps * (moved - self.x).sign()).clamp(0, 1)
            right &= correct(self.model, moved, self.y)
        return right

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.x.device).manual_seed(self.seed)


def correct(model: nn.Module, x: Tensor, y: Tensor, batch_size: int | None = None) -> Tensor:
    """Whether each sample is classified right; logits that are not finite are an error of the model.  [B]"""
    right = torch.zeros_like(y, dtype=torch.bool)
    size = batch_size or max(1, len(x))
    for part, xs, ys in zip(right.split(size), x.split(size), y.split(size), strict=True):
        with attacked(model), torch.no_grad():
            logits = model(xs.clone())  # a model that changes its input must not change the data
        part.copy_((logits.argmax(1) == ys) & logits.isfinite().all(1))
    return right


def run_checks(subject: Subject, training: bool = False) -> list[Check]:
    """All checks that need nothing but the model and samples, in the order in which a report shows them.

    Args:
        subject: What is checked.
        training: Whether a module of the model was in training mode when it was given.

    >>> from robustkern.evaluation import Subject, run_checks
    >>> x = torch.rand(8, 1, 2, 2)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    >>> checks = run_checks(Subject(model, x, model(x).argmax(1), eps=0.1, steps=2))
    >>> all(check.finding for check in checks)
    True
    """
    subject = replace(subject, x=subject.x.clone())  # a model may change its input
    outcomes = [eval_mode(training)]
    for name, check in _CHECKS.items():
        try:
            outcomes.append(check(subject))
        except Exception as error:  # a model that cannot take a batch of one, for example: see "batch independent"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            outcomes.append(Check(name, False, f"could not be run: {reason}"))
    return outcomes


def eval_mode(training: bool) -> Check:
    """Dropout and BatchNorm in training mode make a prediction random, or dependent on the rest of the batch."""
    finding = "a module was in training mode; measured in eval mode" if training else "every module in eval mode"
    return Check("eval mode", not training, finding)


def deterministic(subject: Subject) -> Check:
    """A random model needs attacks on its expectation: five passes must agree."""
    with attacked(subject.model), torch.no_grad():
        passes = [F.normalize(subject.model(subject.x).double(), dim=1) for _ in range(5)]
    spread = max(float((p - passes[0]).norm(dim=1).max()) for p in passes)
    found = "the same logits in five passes" if spread <= 1e-4 else f"logits differ by {spread:.1e} from pass to pass"
    return Check("deterministic", spread <= 1e-4, found, {"spread": spread})


def batch_independent(subject: Subject) -> Check:
    """A prediction must depend on the sample alone, not on its neighbours: batches of 1, 7 and 64, and shuffled."""
    x = subject.x[:64]
    with attacked(subject.model), torch.no_grad():
        whole = subject.model(x).double()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(subject.seed)).to(x.device)
        shuffled = torch.empty_like(whole)
        shuffled[order] = subject.model(x[order]).double()
        others = [shuffled] + [torch.cat([subject.model(part) for part in x.split(size)]).double() for size in (1, 7)]
    scale = whole.abs().max().clamp_min(1e-12)
    difference = max(float((other - whole).abs().max() / scale) for other in others)
    passed = difference <= 1e-4
    same, changed = "the same logits in batches of 1, 7 and 64", f"logits change by {difference:.1e} with the batch"
    return Check("batch independent", passed, same if passed else changed, {"relative_difference": difference})


def logits(subject: Subject) -> Check:
    """Attacks treat the outputs as logits: with probabilities, their loss has hardly any gradient."""
    with attacked(subject.model), torch.no_grad():
        outputs = subject.model(subject.x).double()
    sums = outputs.sum(1)
    probabilities = bool((outputs >= -1e-5).all() and (outputs <= 1 + 1e-5).all() and ((sums - 1).abs() < 1e-5).all())
    logs = bool((outputs <= 1e-5).all() and ((outputs.exp().sum(1) - 1).abs() < 1e-4).all())
    found = "outputs are probabilities, not logits" if probabilities else "outputs are unnormalised"
    if logs:
        found = "outputs are log-probabilities, which serve as logits"
    return Check("logits", not probabilities, found, {"classes": outputs.shape[1]})


def static(subject: Subject) -> Check:
    """A model that adapts to its input (optimises it, or changes it in place) is not the function that is attacked."""
    x = subject.x[:16].clone()
    with attacked(subject.model), torch.no_grad(), _backward_calls() as calls:
        subject.model(x)
    changed = not torch.equal(x, subject.x[:16])
    found = "no gradient is taken inside the model"
    if calls:
        found = f"the model differentiates inside its forward pass ({len(calls)} times)"
    elif changed:
        found = "the model changes its input in place"
    return Check("static", not calls and not changed, found, {"backward_calls": len(calls), "changes_input": changed})


def gradients(subject: Subject) -> Check:
    """Where the input gradient is zero, in float32 or in any precision, an attack on the cross-entropy goes nowhere."""
    right = correct(subject.model, subject.x, subject.y)
    x, y = subject.x[right], subject.y[right]
    flat32 = _flat_share(subject.model, x.float(), y)
    values: dict[str, Any] = {"share_float32": flat32, "share_float64": None}
    try:
        double = copy.deepcopy(subject.model).double()
        values["share_float64"] = _flat_share(double, x.double(), y)
    except Exception as error:  # whatever a foreign model raises in another precision
        values["float64_error"] = f"{type(error).__name__}: {error}"
    worst = max(flat32, values["share_float64"] or 0.0)
    found = f"{100 * worst:.1f} % of the samples have an input gradient below {_FLAT:g}"
    if flat32 > _FEW_POINTS and values["share_float64"] is not None and values["share_float64"] <= _FEW_POINTS:
        found += " in float32, in float64 they have one: the logits are saturated"
    return Check("gradients", worst <= _FEW_POINTS, found, values)


def scale(subject: Subject) -> Check:
    """Logits that saturate the cross-entropy hide adversaries: rescaled logits and margin losses must find no more."""
    attack = subject.pgd()
    accuracies = {f"ce, logits x {factor:g}": subject.accuracy(attack, _Scaled(subject.model, factor))
                  for factor in (1.0, 0.01, 0.1, 10.0, 100.0)}  # fmt: skip
    for loss in ("cw", "dlr") if _classes(subject) > 2 else ("cw",):
        accuracies[loss] = subject.accuracy(replace(attack, loss=loss))
    # Which loss is best differs from model to model: what was reported must hold against all of them.
    claimed = accuracies["ce, logits x 1"] if subject.reported is None else subject.reported
    name, least = min(accuracies.items(), key=lambda item: item[1])
    passed = least >= claimed - (_LOSSES_DIFFER if subject.reported is None else _FEW_POINTS)
    found = f"PGD-{subject.steps} on other scales and losses leaves {_percent(least)} or more of {_percent(claimed)}"
    if not passed:
        found = f"{_percent(claimed)} withstand the attacks, but PGD-{subject.steps} on {name} leaves {_percent(least)}"
    return Check("scale", passed, found, accuracies)


def radii(subject: Subject) -> Check:
    """Accuracy must be the clean one at radius 0, fall with the radius, and vanish where every image is in reach."""
    everything = box_diameter(subject.norm, subject.x.shape[1:])
    chosen = sorted({0.0, 0.5 * subject.eps, subject.eps, min(2 * subject.eps, everything), everything})
    accuracies = {eps: subject.accuracy(subject.pgd(eps=eps)) for eps in chosen}
    ordered = list(accuracies.values())
    values = {f"{eps:g}": accuracy for eps, accuracy in accuracies.items()}
    unclean = abs(ordered[0] - subject.clean()) > 0
    rising = any(later > sooner + _FEW_POINTS for sooner, later in pairwise(ordered))
    unreachable = ordered[-1] > max(1 / _classes(subject), 0.05)
    found = "accuracy falls from clean to " + _percent(ordered[-1]) + " as the radius grows to the whole box"
    if unclean:
        found = f"at radius 0, accuracy is {_percent(ordered[0])} instead of the clean {_percent(subject.clean())}"
    elif rising:
        found = "accuracy rises with the radius: " + ", ".join(f"{e} {_percent(a)}" for e, a in values.items())
    elif unreachable:
        found = f"{_percent(ordered[-1])} survive an attack that may change the image into any other"
    return Check("radii", not (unclean or rising or unreachable), found, values)


def effort(subject: Subject) -> Check:
    """More steps and restarts must not find less, and one step must not find more than many."""
    single = subject.accuracy(FGSM(subject.eps, random_start=False)) if subject.norm == "linf" else None
    values: dict[str, Any] = {
        "fgsm": single,
        "1 step": subject.accuracy(subject.pgd(steps=1, step_size=subject.eps)),
        f"{subject.steps} steps": subject.accuracy(subject.pgd()),
        f"{2 * subject.steps} steps, 3 restarts": subject.accuracy(subject.pgd(steps=2 * subject.steps, restarts=3)),
    }
    many, most = values[f"{subject.steps} steps"], values[f"{2 * subject.steps} steps, 3 restarts"]
    ones = [a for a in (single, values["1 step"]) if a is not None]
    passed = min(ones) >= many - _FEW_POINTS and many >= most - _LOSSES_DIFFER
    found = f"one step leaves {_percent(min(ones))}, {subject.steps} leave {_percent(many)}, more {_percent(most)}"
    return Check("effort", passed, found, values)


def black_box(subject: Subject) -> Check:
    """An attack without gradients (random points of the ball) must not find more than one with gradients."""
    noisy = float(subject.noise().float().mean())
    white = subject.accuracy(subject.pgd()) if subject.reported is None else subject.reported
    found = f"20 random points of the ball leave {_percent(noisy)}, the attacks {_percent(white)}"
    return Check("black box", noisy >= white - _FEW_POINTS, found, {"noise": noisy, "white_box": white})


_CHECKS: dict[str, Callable[[Subject], Check]] = {
    check.__name__.replace("_", " "): check
    for check in (static, deterministic, batch_independent, logits, gradients, scale, radii, effort, black_box)
}


class _Scaled(nn.Module):
    """A model whose logits are multiplied by a number."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


def _flat_share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the samples whose cross-entropy has no entry of its input gradient above `_FLAT`."""
    if not len(x):
        return 0.0
    leaf = x.clone().requires_grad_()
    with attacked(model), torch.enable_grad():
        outputs = model(leaf)
        if not outputs.requires_grad:
            return 1.0
        (grad,) = torch.autograd.grad(F.cross_entropy(outputs, y, reduction="sum"), leaf, allow_unused=True)
    if grad is None:
        return 1.0
    return float((~(grad.flatten(1).abs().amax(1) > _FLAT)).float().mean())


def _classes(subject: Subject) -> int:
    with attacked(subject.model), torch.no_grad():
        return subject.model(subject.x[:1].clone()).shape[1]


@contextmanager
def _backward_calls() -> Iterator[list[str]]:
    """Names of the functions that start a backward pass inside, whichever way they call autograd."""
    engine = torch.autograd.graph._engine_run_backward.__code__
    calls: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is engine:
            calls.append(frame.f_back.f_code.co_name if frame.f_back else "")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f} %"
