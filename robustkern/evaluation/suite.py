"""The evaluation: clean and attacked accuracies, the curve over the radius, steepness, and the checks behind them."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustkern._packages import pip_install
from robustkern._text import brief
from robustkern.attacks import APGD, PGD, attacked
from robustkern.attacks._common import box_diameter
from robustkern.data import Images

from .checks import Check, Subject, correct, run_checks
from .measures import linearised_robustness, local_lipschitz, logit_margin
from .results import Accuracy, Report, Settings

Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # (model, x, y, indices) -> adversary
_CURVE_SAMPLES = 500
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # multiples of eps, for accuracy against the radius
_NOT_INCLUDED = " See flags_doc.md for details."  # how AutoAttack's warnings end; the package comes without that file


class MissingPackage(RuntimeError):
    """A package that an attack comes from is not installed."""


def evaluate(
    model: nn.Module,
    data: Images,
    settings: Settings,
    *,
    device: str = "cpu",
    on_stage: Callable[[str, int, int], None] | None = None,
    on_attack: Callable[[Report], None] | None = None,
) -> Report:
    """Measure a classifier's robustness, and whether the measurement can be believed.

    Every attack is run on every sample that is classified right; a sample that is not counts as wrong under any attack.

    Args:
        model: Maps images in [0, 1] to logits, normalisation inside; left unchanged.
        data: The images; none of them may have been used to train or choose the model.
        settings: What is measured.
        device: Where the model is.
        on_stage: Called with the name of what is being measured, and how many of how many samples are done.
        on_attack: Called with the report so far whenever an attack is finished.

    Raises:
        MissingPackage: AutoAttack is asked for and pyautoattack is not installed.
        ValueError: The model does not give logits for the classes of the data.

    >>> from robustkern.data import load
    >>> from robustkern.evaluation import Settings, evaluate
    >>> from robustkern.models import create
    >>> settings = Settings(0.1, samples=20, attacks=("pgd",), pgd_steps=2, restarts=1, check_samples=5)
    >>> report = evaluate(create("small-cnn", 10, (1, 8, 8)), load("digits", split="test"), settings)
    >>> report.worst.value <= report.clean.value
    True
    """
    if "autoattack" in settings.attacks:
        autoattack_package()  # before anything is attacked
    report_stage = on_stage or (lambda stage, done, total: None)
    training = any(module.training for module in model.modules())
    data = data.first(settings.samples or None).in_memory()
    x, y = data.images.to(device), data.labels.to(device)
    started = time.perf_counter()
    right = correct(model, x, y, settings.batch_size)
    with attacked(model), torch.no_grad():
        width = model(x[:1]).shape[1]
    if width != data.num_classes:
        raise ValueError(f"the model gives {width} logits, {data.name} has {data.num_classes} classes")
    clean = Accuracy.of("clean", right, started)
    report = Report(settings, clean, data.classes, x, y)

    survivors = right.clone()
    with _warnings_of("auto-attack") as report.warnings:
        for name, attack in _attacks(settings, width):
            started = time.perf_counter()
            # AutoAttack makes batches itself, and raises its flags from all samples that it is given.
            size = len(x) if name == "AutoAttack" else settings.batch_size
            on_batch = partial(report_stage, name)
            report.adversaries[name], standing = _attack_all(
                model, x, y, right, attack, settings.batch_size, size, on_batch
            )
            survivors &= standing
            report.attacks.append(Accuracy.of(name, standing, started))
            report.worst = Accuracy.of("worst case", survivors)
            if on_attack is not None:
                on_attack(report)
    for label, name in enumerate(data.classes):
        members = y == label
        accuracy = Accuracy.of(name, right[members]).to_dict()
        worst = Accuracy.of(name, survivors[members]).to_dict() if report.attacks else None
        report.per_class.append({"class": name, "clean": accuracy, "worst": worst})
    _measure_curve(report, model, report_stage)
    _measure_steepness(report, model, report_stage)
    report_stage("checks", 0, 1)
    few = settings.check_samples
    if not right[:few].any():  # attacks had nothing to do, so every check would pass
        report.unchecked = f"none of the first {len(right[:few])} images is classified right"
    else:
        reported = float(survivors[:few].float().mean()) if report.attacks else None
        subject = Subject(model, x[:few], y[:few], settings.eps, settings.norm, seed=settings.seed, reported=reported)
        report.checks = run_checks(subject, training)
    if right.any() and report.attacks:
        report.checks.append(_in_ball(settings, x, report.adversaries))
        if "autoattack" in settings.attacks:
            # Such as that its black-box attack succeeded where its white-box ones did not.
            flags = "; ".join(report.warnings) or "AutoAttack raised no flag"
            report.checks.append(Check("AutoAttack's flags", not report.warnings, flags))
    return report


def recheck(report: Report, model: nn.Module, stored: dict[str, Tensor], identity: str | None = None) -> Check:
    """The stored images must belong to this evaluation, give its accuracies, and be in the ball around the clean ones.

    Args:
        report: What was found.
        model: The model it was found on.
        stored: What `adversaries.safetensors` holds: "clean", "labels", and for each attack its adversarial images.
        identity: The evaluation that its metadata name; None: the same.

    >>> from robustkern.data import load
    >>> from robustkern.evaluation import Settings, evaluate, recheck
    >>> from robustkern.models import create
    >>> settings = Settings(0.1, samples=20, attacks=("pgd",), pgd_steps=2, restarts=1, check_samples=5)
    >>> model = create("small-cnn", 10, (1, 8, 8))
    >>> report = evaluate(model, load("digits", split="test"), settings)
    >>> stored = {"clean": report.x, "labels": report.y, **report.adversaries}
    >>> recheck(report, model, stored).passed
    True
    """
    if identity not in (None, report.identity):
        return Check("reproduced from file", False, f"the file belongs to another evaluation, {brief(identity)}")
    if missing := {"clean", "labels", *(attack.name for attack in report.attacks)} - set(stored):
        return Check("reproduced from file", False, f"the file has no {min(missing)}")
    stored = {name: tensor.to(report.x.device) for name, tensor in stored.items()}
    x, y = stored.pop("clean"), stored.pop("labels")
    right = correct(model, x, y, report.settings.batch_size)
    values: dict[str, Any] = {}
    wrong = []
    for attack in report.attacks:
        again = correct(model, stored[attack.name], y, report.settings.batch_size)
        values[attack.name] = int((right & again).sum())
        if values[attack.name] != attack.right:
            wrong.append(f"{attack.name}: {values[attack.name]} right instead of {attack.right}")
    ball = _in_ball(report.settings, x, stored)
    if not ball.passed:
        wrong.append(ball.finding)
    found = "; ".join(wrong) or f"the stored images give the same accuracies, {ball.finding}"
    return Check("reproduced from file", not wrong, found, {**values, **ball.values})


def autoattack_package() -> Any:
    """The package pyautoattack.

    Raises:
        MissingPackage: It is not installed.
    """
    try:
        import pyautoattack
    except ImportError as error:
        raise MissingPackage(
            f"AutoAttack needs the package pyautoattack: {pip_install('pyautoattack')}, or leave it out with "
            "--attacks pgd,apgd"
        ) from error
    return pyautoattack


def _attacks(settings: Settings, classes: int) -> Iterator[tuple[str, Attack]]:
    eps, norm, seed = settings.eps, settings.norm, 1000 * settings.seed
    if "pgd" in settings.attacks:
        pgd = PGD(
            eps, step_size=eps / 4, steps=settings.pgd_steps, restarts=settings.restarts, norm=norm, early_exit=True
        )
        yield f"PGD-{settings.pgd_steps}x{settings.restarts}", _seeded(pgd, seed)
    if "apgd" in settings.attacks:
        apgd = APGD(eps, steps=settings.apgd_steps, norm=norm)
        yield "APGD-CE", _seeded(apgd, seed + 1)
        if classes > 3:
            yield "APGD-T", _seeded(replace(apgd, loss="dlr-targeted", restarts=min(classes - 1, 9)), seed + 2)
        else:
            yield "APGD-CW", _seeded(replace(apgd, loss="cw"), seed + 2)
    if "autoattack" in settings.attacks:
        yield "AutoAttack", lambda model, x, y, indices: _autoattack(model, x, y, settings, classes)


def _seeded(attack: PGD | APGD, seed: int) -> Attack:
    """The attack with random starts that depend on the seed and on the sample's number."""
    seed %= 2**63
    return lambda model, x, y, indices: attack(
        model, x, y, torch.Generator(x.device).manual_seed(seed), indices=indices
    )


def _autoattack(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, classes: int) -> Tensor:
    """AutoAttack standard; where there are too few classes for its targeted attacks, their untargeted forms."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        attack = autoattack_package().AutoAttack(
            model, device=x.device, eps=settings.eps, norm={"linf": "Linf", "l2": "L2"}[settings.norm],
            seed=settings.seed, version="standard",
        )  # fmt: skip
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        if classes < 4:
            attack.attacks_to_run = ["apgd-ce", *(["apgd-dlr"] if classes > 2 else []), "fab", "square"]
        with attacked(model):
            adversary, _ = attack.run_standard_evaluation(x, y, batch_size=settings.batch_size)
    return adversary.detach()


def _attack_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    right: Tensor,
    attack: Attack,
    batch_size: int,
    attack_size: int,
    on_batch: Callable[[int, int], None],
) -> tuple[Tensor, Tensor]:
    """Adversaries of the samples classified right, with the others unchanged; and which are still classified right.

    The attack gets `attack_size` samples at a time. `on_batch` is told how many samples are done, and of how many.
    """
    adversary = x.clone()
    chosen = right.nonzero().squeeze(1)
    done = 0
    on_batch(done, len(chosen))
    for indices in chosen.split(attack_size) if len(chosen) else ():
        adversary[indices] = attack(model, x[indices], y[indices], indices).to(x.dtype)
        done += len(indices)
        on_batch(done, len(chosen))
    # In the same batches as the clean accuracy: a sum in another order may change the class of a borderline sample.
    return adversary, right & correct(model, adversary, y, batch_size)


def _measure_curve(report: Report, model: nn.Module, report_stage: Callable[[str, int, int], None]) -> None:
    settings = report.settings
    x, y = report.x[:_CURVE_SAMPLES], report.y[:_CURVE_SAMPLES]
    right = correct(model, x, y, settings.batch_size)
    widest = box_diameter(settings.norm, x.shape[1:])
    for place, multiple in enumerate(RADII):
        report_stage("accuracy against eps", place, len(RADII))
        eps = multiple * settings.eps
        standing, size = right, settings.batch_size
        if eps:
            pgd = PGD(min(eps, widest), steps=20, norm=settings.norm, early_exit=True)
            attack = _seeded(pgd, settings.seed)
            _, standing = _attack_all(model, x, y, right, attack, size, size, lambda *_: None)
        report.curve.append({"eps": eps, **Accuracy.of("PGD-20", standing).to_dict()})


def _measure_steepness(report: Report, model: nn.Module, report_stage: Callable[[str, int, int], None]) -> None:
    settings = report.settings
    x, y = report.x[: settings.check_samples], report.y[: settings.check_samples]
    report_stage("steepness", 0, 1)
    generator = torch.Generator(x.device).manual_seed(settings.seed)
    # For Linf balls, whatever the norm of the attacks.
    ball, radius = ("", settings.eps) if settings.norm == "linf" else (", linf at 8/255", 8 / 255)
    measured = {
        f"local Lipschitz constant{ball} (lower bound)": local_lipschitz(model, x, radius, generator=generator),
        "logit margin": logit_margin(model, x, y),
        f"linearised robustness, {settings.norm}": linearised_robustness(model, x, y, settings.norm),
    }
    report.steepness.update({name: _summary(values) for name, values in measured.items()})


def _summary(values: Tensor) -> dict[str, float | None]:
    finite = values[values.isfinite()].double()
    if not len(finite):
        return {**dict.fromkeys(("mean", "q1", "median", "q3")), "samples": 0}
    q1, median, q3 = (float(q) for q in torch.quantile(finite, finite.new_tensor([0.25, 0.5, 0.75])))
    return {"mean": float(finite.mean()), "q1": q1, "median": median, "q3": q3, "samples": len(finite)}


def _in_ball(settings: Settings, x: Tensor, adversaries: dict[str, Tensor]) -> Check:
    """Every adversarial image must be a valid image within eps of the clean one; recomputed from both."""
    farthest, outside = 0.0, 0.0
    for adversary in adversaries.values():
        change = (adversary.double() - x.double()).flatten(1)
        distance = change.abs().amax(1) if settings.norm == "linf" else change.norm(dim=1)
        farthest = max(farthest, float(distance.max()) if len(distance) else 0.0)
        outside = max(outside, float((adversary - adversary.clamp(0, 1)).abs().max()) if len(distance) else 0.0)
    finite = all(bool(adversary.isfinite().all()) for adversary in adversaries.values())
    passed = finite and farthest <= settings.eps * (1 + 1e-5) + 1e-6 and outside == 0
    found = f"no change larger than {farthest:.6g}, all values in [0, 1]"
    if not passed:
        found = f"a change of {farthest:.6g} where {settings.eps:.6g} is allowed, {outside:.2g} outside [0, 1]"
    return Check("in the ball", passed, found, {"farthest": farthest, "outside": outside})


@contextmanager
def _warnings_of(logger_name: str) -> Iterator[list[str]]:
    """The warnings that a logger gets inside, each once."""
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage().removesuffix(_NOT_INCLUDED)
            if message not in seen:
                seen.append(message)

    logger, handler = logging.getLogger(logger_name), Keep(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield seen
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
