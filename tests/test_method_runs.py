"""Methods as runs: resumed to the same bits where they attack, options refused, defaults as published."""

import json
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from robustkern import losses
from robustkern.attacks import FGSM, NFGSM, PGD
from robustkern.training import METHODS, CheckpointError, Observer, UsageError, build_loss, recipe, train

SMALL = {"epochs": 2, "batch_size": 32, "train_samples": 96, "eval_samples": 10, "pgd_steps": 2, "threads": 1,
         "checkpoint_every": 2}  # fmt: skip
ATTACKS = [("trades", {"steps": 2}), ("n-fgsm", {"awp": 0.01}), ("vat", {}), ("gradalign", {}), ("llr", {"steps": 1})]


class _Crash(BaseException):
    """Not an Exception: nothing may handle it."""


class _CrashAt(Observer):
    def on_step(self, progress):
        if progress.step == 3:
            raise _Crash


def outcome(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (out / "model.safetensors").read_bytes(), [{**row, "ms_per_step": None} for row in rows]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("method", "options"), ATTACKS, ids=str)
def test_a_resumed_attack_finds_the_same(tmp_path, method, options):
    """Its random numbers depend on the step, whatever was drawn before."""
    config = recipe("digits", method, options=options, **SMALL)
    train(config, tmp_path / "whole")
    with pytest.raises(_Crash):
        train(config, tmp_path / "crashed", observer=_CrashAt())
    torch.rand(3)
    train(config, tmp_path / "crashed", resume=True)
    assert outcome(tmp_path / "crashed") == outcome(tmp_path / "whole")


def built(method, **options):
    return build_loss(method, options, eps=8 / 255, impl="auto")


def test_defaults_are_the_published_ones():
    trades, mart, llr = built("trades"), built("mart"), built("llr")
    assert (trades.weight, trades.steps, trades.start, mart.weight, llr.weight, llr.ratio) == (
        6,
        10,
        "gaussian",
        5,
        4,
        0.75,
    )
    assert built("pgd").attack == PGD(8 / 255, None, 10) and built("pgd").weight == 1
    assert losses.AdversarialTraining().attack == losses.ALP().attack == PGD(8 / 255, 2 / 255, steps=10)
    assert built("fgsm").attack == FGSM(8 / 255) and built("n-fgsm").attack == NFGSM(8 / 255)
    assert built("fgsm", step_size=0.01).attack.step_size == 0.01
    assert (built("label-smoothing").weight, built("gradalign").weight, built("cure").weight) == (0.1, 0.2, 4.0)
    assert built("alp").weight == 0.5 and built("vat").norm == "linf"
    assert built("gradient-penalty", estimator="finite-difference", h="0.5").h == 0.5
    for method in ("fgsm", "n-fgsm", "pgd", "trades", "mart", "alp", "vat", "llr", "gradalign"):
        wrapped = built(method, awp=0.005)
        assert isinstance(wrapped, losses.AWP) and wrapped.gamma == 0.005
        assert type(wrapped.loss) is type(built(method))
    assert {name for name, method in METHODS.items() if method.single_step} == {"fgsm", "n-fgsm", "gradalign"}


def test_training_at_the_adversary_has_no_ramp_unless_asked():
    assert recipe("digits", "pgd").ramp == 0 < recipe("digits", "trades").ramp
    assert recipe("digits", "pgd", ramp=0.2).ramp == 0.2
    assert recipe("digits", "pgd").options["label_smoothing"] == 0 == recipe("digits").options["label_smoothing"]
    assert recipe("digits", "gradient-penalty").options["label_smoothing"] > 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("distillation", {}, "distillation needs the option teacher: the run directory of a trained network"),
        ("trades", {"steps": 0}, "method trades: TRADES: steps must be an integer of at least 1, got 0"),
        ("pgd", {"weight": -1.0}, "method pgd: AdversarialTraining: weight must be"),
        ("label-smoothing", {"weight": 2.0}, "method label-smoothing: LabelSmoothing: weight must be"),
        ("mart", {"awp": -1.0}, "method mart: AWP: gamma must be"),
        ("gradient-penalty", {"estimator": "fd"}, "GradientPenalty: estimator must be one of"),
        ("vat", {"xi": 0.0}, r"method vat: VAT: xi must be a number in \(0, inf\), got 0.0"),
        ("cure", {"steps": 3}, "method cure has no option steps"),
    ],
)
def test_options_are_refused(method, options, message):
    with pytest.raises(UsageError, match=message):
        built(method, **options)


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ("pgd", {"steps": 7.9}, "an integer"), ("pgd", {"steps": True}, "an integer"),
        ("pgd", {"steps": "7.5"}, "an integer"), ("pgd", {"steps": float("inf")}, "an integer"),
        ("pgd", {"steps": None}, "an integer"), ("pgd", {"step_size": True}, "a number"),
        ("pgd", {"step_size": "2/0"}, "a number"), ("pgd", {"step_size": [0.1]}, "a number"),
        ("distillation", {"teacher": None}, "a text"), ("distillation", {"teacher": 3}, "a text"),
        ("jacobian", {"law": True}, "a text"),
    ],
)  # fmt: skip
def test_options_of_another_type_are_refused(method, options, kind):
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=re.escape(f"option {name} of method {method} must be {kind}, got {value!r}")):
        METHODS[method].complete(method, options)


def test_numbers_may_be_written_as_text_and_fractions():
    options = METHODS["pgd"].complete("pgd", {"steps": "7", "step_size": "2/255", "weight": 1})
    assert (options["steps"], options["step_size"], options["weight"]) == (7, 2 / 255, 1.0)
    assert [type(options[name]) for name in ("steps", "step_size", "weight")] == [int, float, float]
    assert METHODS["pgd"].complete("pgd", {"steps": 7.0})["steps"] == 7
    assert METHODS["gradient-penalty"].complete("gradient-penalty", {"norm": "inf"})["norm"] == float("inf")


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*no such file"):
        built("distillation", teacher=str(tmp_path))
