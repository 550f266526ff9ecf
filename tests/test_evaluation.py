"""The evaluation: consistent figures, and a deliberately bad model for each of its flags."""

import copy
import io
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bad_models import (
    AdaptsItsInput,
    BatchStatistics,
    ChangesItsInput,
    Random,
    Rounded,
    Saturated,
    Softmax,
    Vanishing,
    Wavy,
)
from robustkern import data, models
from robustkern.cli.evaluate import print_report
from robustkern.evaluation import (
    MissingPackage,
    Settings,
    Subject,
    checks,
    evaluate,
    recheck,
    run_checks,
)
from robustkern.evaluation.report import export_state_dict, to_dict, write_report

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
EPS = 0.1
QUICK = Settings(
    eps=EPS,
    samples=60,
    attacks=("pgd", "apgd"),
    pgd_steps=10,
    restarts=2,
    apgd_steps=10,
    check_samples=60,
    batch_size=25,
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="test")


def trained(network, train, steps=150):
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(train), (100,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(train.images[chosen]), train.labels[chosen], label_smoothing=0.2).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return trained(network, data.load("digits", split="train"))


def flags(model, digits, training=False, **options):
    subject = Subject(model, digits.images[:60], digits.labels[:60], **{"eps": EPS, "steps": 10, **options})
    return {check.name for check in run_checks(subject, training) if not check.passed}


def test_a_plain_model_raises_no_flag(model, digits):
    assert flags(model, digits) == set()


def test_an_evaluation_is_consistent(model, digits):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = evaluate(model, digits, QUICK)
    assert report.sound, [check for check in report.checks if not check.passed]
    assert report.clean.samples == 60 and report.clean.value > 0.85
    assert [a.name for a in report.attacks] == ["PGD-10x2", "APGD-CE", "APGD-T"]
    assert all(report.worst.right <= a.right <= report.clean.right for a in report.attacks)
    assert 0 < report.worst.right < report.clean.right
    assert sum(row["clean"]["right"] for row in report.per_class) == report.clean.right
    assert sum(row["worst"]["right"] for row in report.per_class) == report.worst.right
    assert report.curve[0]["accuracy"] == report.clean.value
    rights = [point["right"] for point in report.curve]
    assert rights == sorted(rights, reverse=True) and rights[-1] < rights[0]
    for adversary in report.adversaries.values():
        assert float((adversary - report.x).abs().max()) <= EPS + 1e-6
    again = evaluate(model, digits, QUICK)
    assert [a.right for a in again.attacks] == [a.right for a in report.attacks]
    assert all(torch.equal(again.adversaries[name], report.adversaries[name]) for name in report.adversaries)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    json.dumps(to_dict(report, {}), allow_nan=False)


def test_the_steepness_says_of_which_ball_it_is(model, digits):
    settings = Settings(0.5, norm="l2", samples=10, attacks=("pgd",), pgd_steps=1, restarts=1, check_samples=5)
    steepness = evaluate(model, digits, settings).steepness
    assert {"local Lipschitz constant, linf at 8/255 (lower bound)", "linearised robustness, l2"} <= set(steepness)


def test_a_clean_error_counts_as_fooled(model, digits):
    wrong = data.Dataset("wrong", digits.images[:20], (digits.labels[:20] + 1) % 10, digits.classes)
    report = evaluate(model, wrong, Settings(eps=1e-6, samples=0, attacks=("pgd",), pgd_steps=1, check_samples=5))
    assert report.clean.right <= 2
    assert report.worst.right <= report.clean.right


def test_what_has_no_number_is_null_in_the_report(digits):
    """A constant classifier: no logit moves, so its linearised robustness is infinite or nothing."""
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    report = evaluate(constant, digits, Settings(EPS, samples=10, attacks=("pgd",), pgd_steps=1, check_samples=10))
    json.dumps(to_dict(report, {}), allow_nan=False)
    assert report.steepness["linearised robustness, linf"]["mean"] is None
    assert not report.sound


@pytest.mark.parametrize(
    "bad, flag",
    [
        (Saturated, "gradients"), (Vanishing, "gradients"), (Rounded, "gradients"), (Rounded, "radii"),
        (Rounded, "black box"), (Random, "deterministic"), (Softmax, "logits"), (BatchStatistics, "batch independent"),
        (Wavy, "effort"), (AdaptsItsInput, "static"), (ChangesItsInput, "static"),
    ],
)  # fmt: skip
def test_a_bad_model_raises_its_flag(bad, flag, model, digits):
    torch.manual_seed(0)
    options = {"eps": 0.3} if flag == "black box" else {}
    assert flag in flags(bad(model), digits, **options)


def test_saturated_logits_are_seen_for_what_they_are(model, digits):
    subject = Subject(Saturated(model), digits.images[:60], digits.labels[:60], EPS)
    checks = {check.name: check for check in run_checks(subject)}
    assert not checks["scale"].passed and "ce, logits x 0.01" in checks["scale"].values
    assert checks["gradients"].values["share_float32"] > 0.5


def test_a_reported_accuracy_that_another_loss_refutes_is_flagged(model, digits):
    assert "scale" in flags(model, digits, reported=0.95)
    assert "scale" not in flags(model, digits, reported=0.0)


def test_batch_norm_in_training_mode(digits):
    torch.manual_seed(0)
    network = models.create("small-cnn", 10, (1, 8, 8))
    network = nn.Sequential(network, nn.BatchNorm1d(10))
    trained(network, data.load("digits", split="train"), steps=30)
    network.train()
    report = evaluate(network, digits, Settings(EPS, samples=20, attacks=("pgd",), pgd_steps=2, check_samples=20))
    assert "eval mode" in {check.name for check in report.checks if not check.passed}
    assert network.training  # unchanged
    frozen = copy.deepcopy(network).eval()
    frozen[1].track_running_stats, frozen[1].running_mean, frozen[1].running_var = False, None, None
    assert "batch independent" in flags(frozen, digits)


def test_chance_is_that_of_the_models_classes_not_of_those_that_occur(model, digits, monkeypatch):
    ones = digits.labels == 1
    subject = Subject(model, digits.images[ones][:20], digits.labels[ones][:20], EPS, steps=2)
    monkeypatch.setattr(Subject, "accuracy", lambda self, attack, model=None: 1.0 - 0.6 * min(attack.eps, 1.0))
    monkeypatch.setattr(Subject, "clean", lambda self, x=None: 1.0)
    check = checks.radii(subject)
    assert not check.passed and "survive an attack" in check.finding


def test_an_adversary_outside_the_ball_is_flagged(model, digits, monkeypatch):
    from robustkern.evaluation import suite

    monkeypatch.setattr(suite.PGD, "__call__", lambda self, model, x, y, generator=None, indices=None: x + 0.2)
    report = evaluate(model, digits, Settings(EPS, samples=20, attacks=("pgd",), check_samples=5))
    (check,) = [check for check in report.checks if check.name == "in the ball"]
    assert not check.passed and check.values["farthest"] == pytest.approx(0.2, rel=1e-5)


def test_stored_adversaries_that_give_another_accuracy_are_flagged(model, digits):
    report = evaluate(model, digits, Settings(EPS, samples=40, attacks=("pgd",), pgd_steps=5, check_samples=5))
    stored = {"clean": report.x, "labels": report.y, **report.adversaries}
    assert recheck(report, model, stored).passed
    assert not recheck(report, model, {**stored, "PGD-5x10": report.x}).passed


@pytest.mark.parametrize("moved", ["clean", "PGD-1x10"])
def test_a_stored_image_outside_the_ball_is_flagged(model, digits, tmp_path, monkeypatch, moved):
    """The content of the file is checked, not that of memory."""
    import safetensors.torch

    from robustkern.evaluation import report as module

    settings = Settings(EPS, samples=10, attacks=("pgd",), pgd_steps=1, check_samples=5)
    report = evaluate(model, digits, settings)
    save = safetensors.torch.save
    blank = int((report.x[0].flatten() == 0).nonzero()[0])  # a pixel of the margin, which no class depends on

    def tampered(tensors, metadata):
        image = tensors[moved].clone()
        image[0].view(-1)[blank] = 0.25
        return save({**tensors, moved: image}, metadata)

    monkeypatch.setattr(safetensors.torch, "save", tampered)
    monkeypatch.setattr(module, "figure", lambda *args: None)
    write_report(report, model, tmp_path, {})
    checks = {check.name: check for check in report.checks}
    assert checks["in the ball"].passed
    assert not checks["reproduced from file"].passed
    assert "where 0.1 is allowed" in checks["reproduced from file"].finding
    assert json.loads((tmp_path / "evaluation.json").read_text())["sound"] is False


def test_autoattack(model, digits, monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    state = torch.get_rng_state()
    settings = Settings(EPS, samples=8, attacks=("apgd", "autoattack"), apgd_steps=100, check_samples=5)
    report = evaluate(model, digits, settings)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = report.attacks[1], report.attacks[2]
    assert theirs.name == "AutoAttack" and theirs.right < report.clean.right
    assert abs(ours.right - theirs.right) <= 1
    assert "AutoAttack's flags" in {check.name for check in report.checks}
    checked = pyautoattack.autoattack.checks.check_range_output  # its flags come before its attacks

    def flags_only(self, x, y, **_):
        checked(self.get_logits, x, logger=self.logger)
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", flags_only)
    soft = evaluate(Softmax(model), digits, Settings(EPS, samples=3, attacks=("autoattack",), check_samples=3))
    (check,) = [check for check in soft.checks if check.name == "AutoAttack's flags"]
    assert not check.passed and "probability" in check.finding


def test_autoattack_judges_all_images_at_once(model, digits, monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    calls = []

    def warns(self, x, y, *, batch_size):
        calls.append((len(x), batch_size))
        pyautoattack.autoattack.checks.check_square_sr(
            {"clean": 1.0, "apgd-ce": 0.5, "square": 0.4}, logger=self.logger
        )
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", warns)
    settings = Settings(EPS, samples=60, attacks=("autoattack",), check_samples=5, batch_size=25)
    report = evaluate(model, digits, settings)
    assert calls == [(report.clean.right, 25)]
    (check,) = [check for check in report.checks if check.name == "AutoAttack's flags"]
    assert not check.passed and "Square Attack has decreased the robust accuracy of 10.00%" in check.finding
    assert "flags_doc" not in check.finding
    inverted = data.Dataset(
        "inverted", digits.images[:9], (model(digits.images[:9]).argmax(1) + 1) % 10, digits.classes
    )
    assert evaluate(model, inverted, settings).worst.right == 0 and len(calls) == 1


def test_autoattack_with_few_classes(digits):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    chosen = digits.labels < 2
    two = data.Dataset("two", digits.images[chosen][:6], digits.labels[chosen][:6], ("0", "1"))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    trained(network, data.Dataset("two", digits.images[chosen], digits.labels[chosen], ("0", "1")), steps=50)
    report = evaluate(network, two, Settings(0.5, attacks=("apgd", "autoattack"), apgd_steps=20, check_samples=3))
    assert [a.name for a in report.attacks] == ["APGD-CE", "APGD-CW", "AutoAttack"]
    assert report.worst.right < report.clean.right


def test_without_autoattack_it_says_what_to_install(model, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(MissingPackage, match="pip install pyautoattack"):
        evaluate(model, digits, Settings(EPS, samples=5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": 0.0}, "eps must be a number in"), ({"norm": "l3"}, "norm must be one of"),
        ({"attacks": ("pgd", "square")}, "no attack 'square'"), ({"restarts": 0}, "restarts must be an integer from 1"),
        ({"samples": -1}, "samples must be an integer from 0"),
    ],
)  # fmt: skip
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"eps": 0.1, **options})


def test_a_model_of_another_number_of_classes_is_refused(model, digits):
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ValueError, match="gives 7 logits, digits has 10 classes"):
        evaluate(narrow, digits, Settings(EPS, samples=5, attacks=("pgd",)))


def test_images_of_another_evaluation_are_flagged(model, digits, tmp_path, monkeypatch):
    """Accuracies and balls may agree by chance; the identity does not."""
    from robustkern.evaluation import report as module

    settings = Settings(EPS, samples=10, attacks=("pgd",), pgd_steps=1, check_samples=5)
    reports = [evaluate(model, digits, settings) for _ in range(2)]
    monkeypatch.setattr(module, "figure", lambda *args: None)
    write_report(reports[0], model, tmp_path, {})
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["identity"] == reports[0].identity and written["finished"] is True
    monkeypatch.setattr(module, "_write_adversaries", lambda report, out: None)  # another process was quicker
    write_report(reports[1], model, tmp_path, {})
    first, second = (report.checks[-1] for report in reports)
    assert first.passed and not second.passed
    assert second.finding == f"the file belongs to another evaluation, {reports[0].identity}"


def test_numbers_that_json_lacks_cost_none_of_the_others(digits, tmp_path):
    class Poisoned(nn.Module):
        def forward(self, x):
            logits = 9 * F.one_hot(digits.labels[: len(x)], 10) + 0 * x.sum((1, 2, 3)).unsqueeze(1)
            return torch.cat([logits[:-1], logits[-1:] * float("nan")])

    report = evaluate(Poisoned(), digits, Settings(EPS, samples=9, attacks=("pgd",), pgd_steps=1, check_samples=9))
    write_report(report, Poisoned(), tmp_path, {})
    text = (tmp_path / "evaluation.json").read_text()
    found = {check["name"]: check for check in json.loads(text)["checks"]}
    assert "NaN" not in text and "Infinity" not in text
    assert found["deterministic"]["values"] == {"spread": None} and not found["deterministic"]["passed"]


def test_no_trouble_with_a_picture_costs_the_numbers(model, digits, tmp_path, monkeypatch):
    from robustkern.evaluation import report as module

    report = evaluate(model, digits, Settings(EPS, samples=10, attacks=("pgd",), pgd_steps=1, check_samples=5))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "figure", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(report, model, tmp_path, {})
    assert json.loads((tmp_path / "evaluation.json").read_text())["worst"] == report.worst.to_dict()
    assert (tmp_path / "adversaries.safetensors").exists()


def test_classes_without_images_are_neither_weakest_nor_drawn(model, digits, tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from rich.console import Console

    few = digits.labels >= 7
    some = data.Dataset("some", digits.images[few][:12], digits.labels[few][:12], digits.classes)
    report = evaluate(model, some, Settings(0.01, attacks=("pgd",), pgd_steps=1, check_samples=5))
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    print_report(report, console, "run")
    assert re.search(r"weakest class: [789], [0-9.]+ % of [1-9]", console.export_text())
    drawn = []
    bar = Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda self, x, *args, **kw: drawn.append(len(x)) or bar(self, x, *args, **kw))
    write_report(report, model, tmp_path, {})
    assert drawn == [3, 3]


def test_the_checks_are_named_as_they_name_themselves(model, digits):
    from robustkern.evaluation.checks import _CHECKS

    subject = Subject(model, digits.images[:20], digits.labels[:20], EPS, steps=2)
    for name, check in _CHECKS.items():
        assert check(subject).name == name


def test_export_holds_tensors_alone(model, tmp_path):
    export_state_dict(model, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(loaded) == ["state_dict"] and set(loaded["state_dict"]) == set(model.state_dict())
