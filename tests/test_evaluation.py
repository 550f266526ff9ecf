"""The evaluation: its figures against closed forms, and a deliberately bad model for each of its flags."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkern import data, models
from robustkern.evaluation import (
    Check,
    MissingPackage,
    Settings,
    Subject,
    evaluate,
    linearised_robustness,
    local_lipschitz,
    logit_margin,
    recheck,
    run_checks,
    wilson_interval,
)
from robustkern.evaluation.command import evaluate_run
from robustkern.evaluation.report import export_state_dict, to_dict, write_report
from robustkern.training import save_weights

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


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_covers_as_often_as_it_says():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        low, high = wilson_interval(int((torch.rand(40, generator=generator) < 0.1).sum()), 40, 0.9)
        covered += low <= 0.1 <= high
    assert 0.87 < covered / 2000 < 0.95


@pytest.mark.parametrize("arguments", [(-1, 10), (11, 10), (1, 10, 0.0), (1, 10, 1.0)])
def test_wilson_interval_refuses(arguments):
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(*arguments)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double().eval()


def test_local_lipschitz_of_a_linear_function(linear):
    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    weight = linear[1].weight
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 16)
    truth = float((signs @ weight.detach().T).abs().sum(1).max())
    found = local_lipschitz(linear, x, 0.1, steps=20, generator=torch.Generator().manual_seed(0))
    assert float(found.max()) <= truth * (1 + 1e-9)
    assert float(found.max()) >= 0.95 * truth
    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    expected = float(one[1].weight.detach().abs().sum())
    torch.testing.assert_close(local_lipschitz(one, x, 0.1), torch.full((3,), expected, dtype=torch.float64))


def test_local_lipschitz_refuses_a_radius_of_nothing(linear):
    with pytest.raises(ValueError, match="eps must be positive"):
        local_lipschitz(linear, torch.rand(1, 1, 4, 4).double(), 0.0)


@pytest.mark.parametrize("norm, dual", [("linf", 1.0), ("l2", 2.0), ("l1", float("inf"))])
def test_linearised_robustness_is_the_distance_to_the_boundary_of_a_linear_classifier(norm, dual, linear):
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3])
    z, weight = linear(x), linear[1].weight
    expected = []
    for i, label in enumerate(y.tolist()):
        others = [j for j in range(5) if j != label]
        slopes = [torch.linalg.vector_norm(weight[label] - weight[j], dual) for j in others]
        expected.append(min((z[i, label] - z[i, j]) / slope for j, slope in zip(others, slopes)))
    torch.testing.assert_close(linearised_robustness(linear, x, y, norm), torch.stack(expected).detach())


def test_linearised_robustness_where_no_logit_moves():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.tensor([2.0, 1.0, 1.0])
    x = torch.rand(3, 1, 2, 2)
    found = linearised_robustness(constant, x, torch.tensor([0, 1, 2]))
    assert found.tolist() == [float("inf"), -float("inf"), -float("inf")]
    with pytest.raises(ValueError, match="norm must be one of"):
        linearised_robustness(constant, x, torch.tensor([0, 1, 2]), "l3")


def test_logit_margin(linear):
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    z = linear(x).detach()
    y = torch.tensor([0, 1, 2, 3])
    expected = [float(z[i, y[i]] - max(z[i, j] for j in range(5) if j != y[i])) for i in range(4)]
    torch.testing.assert_close(logit_margin(linear, x, y), torch.tensor(expected, dtype=torch.float64))


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


def test_a_clean_error_counts_as_fooled(model, digits):
    wrong = data.Dataset("wrong", digits.images[:20], (digits.labels[:20] + 1) % 10, digits.classes)
    report = evaluate(model, wrong, Settings(eps=1e-6, samples=0, attacks=("pgd",), pgd_steps=1, check_samples=5))
    assert report.clean.right <= 2
    assert report.worst.right <= report.clean.right


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)


class Saturated(Wrapped):
    def forward(self, x):
        return 1000 * self.model(x)


class Vanishing(Wrapped):
    def forward(self, x):
        return 1e-9 * self.model(x)


class Rounded(Wrapped):
    def forward(self, x):
        return self.model((4 * x).round() / 4)


class Random(Wrapped):
    def forward(self, x):
        return self.model(x) + 0.3 * torch.randn(len(x), 10)


class Softmax(Wrapped):
    def forward(self, x):
        return self.model(x).softmax(1)


class BatchStatistics(Wrapped):
    def forward(self, x):
        z = self.model(x)
        return z - 0.5 * z.mean(0)


class AdaptsItsInput(Wrapped):
    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z = self.model(leaf)
            (grad,) = torch.autograd.grad(z.logsumexp(1).sum() - z.amax(1).sum(), leaf)
        return self.model(x - 0.05 * grad.sign())


class ChangesItsInput(Wrapped):
    def forward(self, x):
        with torch.no_grad():
            x.clamp_(0.1, 0.9)
        return self.model(x)


@pytest.mark.parametrize(
    "bad, flag",
    [
        (Saturated, "gradients"), (Vanishing, "gradients"), (Rounded, "gradients"), (Rounded, "radii"),
        (Rounded, "black box"), (Random, "deterministic"), (Softmax, "logits"), (BatchStatistics, "batch independent"),
        (AdaptsItsInput, "static"), (ChangesItsInput, "static"),
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
    assert network.training  # as it came
    frozen = copy.deepcopy(network).eval()
    frozen[1].track_running_stats, frozen[1].running_mean, frozen[1].running_var = False, None, None
    assert "batch independent" in flags(frozen, digits)


def test_one_step_that_beats_many_is_flagged(model, digits, monkeypatch):
    def accuracy(self, attack, model=None):
        return 0.2 if getattr(attack, "steps", 1) == 1 else 0.6

    monkeypatch.setattr(Subject, "accuracy", accuracy)
    assert "effort" in flags(model, digits)


def test_an_adversary_outside_the_ball_is_flagged(model, digits, monkeypatch):
    from robustkern.evaluation import suite

    monkeypatch.setattr(suite.PGD, "__call__", lambda self, model, x, y, generator=None, indices=None: x + 0.2)
    report = evaluate(model, digits, Settings(EPS, samples=20, attacks=("pgd",), check_samples=5))
    (check,) = [check for check in report.checks if check.name == "in the ball"]
    assert not check.passed and check.values["farthest"] == pytest.approx(0.2, rel=1e-5)


def test_stored_adversaries_that_give_another_accuracy_are_flagged(model, digits):
    report = evaluate(model, digits, Settings(EPS, samples=40, attacks=("pgd",), pgd_steps=5, check_samples=5))
    assert recheck(report, model, report.adversaries).passed
    assert not recheck(report, model, {"PGD-5x10": report.x}).passed


def test_autoattack(model, digits):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    state = torch.get_rng_state()
    settings = Settings(EPS, samples=8, attacks=("apgd", "autoattack"), apgd_steps=100, check_samples=5)
    report = evaluate(model, digits, settings)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = report.attacks[1], report.attacks[2]
    assert theirs.name == "AutoAttack" and theirs.right < report.clean.right
    assert abs(ours.right - theirs.right) <= 1
    assert "AutoAttack's flags" in {check.name for check in report.checks}
    soft = evaluate(Softmax(model), digits, Settings(EPS, samples=3, attacks=("autoattack",), check_samples=3))
    (check,) = [check for check in soft.checks if check.name == "AutoAttack's flags"]
    assert not check.passed and "probability" in check.finding


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
    with pytest.raises(MissingPackage, match=r"pip install 'robustkern\[eval\]'"):
        evaluate(model, digits, Settings(EPS, samples=5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": 0.0}, "eps must be positive"), ({"norm": "l3"}, "norm must be one of"),
        ({"attacks": ("pgd", "square")}, "no attack 'square'"), ({"restarts": 0}, "restarts must be at least 1"),
        ({"samples": -1}, "samples must not be negative"),
    ],
)  # fmt: skip
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"eps": 0.1, **options})


def test_a_model_of_another_number_of_classes_is_refused(model, digits):
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ValueError, match="gives 7 logits, digits has 10 classes"):
        evaluate(narrow, digits, Settings(EPS, samples=5, attacks=("pgd",)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = trained(models.create("small-cnn", 10, (1, 8, 8)), data.load("digits", split="train"), steps=30)
    classes = [str(i) for i in range(10)]
    description = {"model": "small-cnn", "classes": classes, "in_shape": [1, 8, 8], "data": "digits", "eps": 0.07}
    save_weights(folder / "model.safetensors", network, description)
    return folder, network


def command(*arguments):
    from typer.testing import CliRunner

    from robustkern.cli import app

    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_writes_what_it_prints(run, tmp_path):
    folder, network = run
    weights = tmp_path / "weights.pt"
    options = ["--samples", 30, "--attacks", "pgd", "--pgd-steps", 5, "--restarts", 1, "--check-samples", 10]
    done = command(folder, *options, "--export", weights)
    assert done.exit_code == 0, done.output
    written = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert written["settings"]["eps"] == 0.07  # what it was trained with
    assert f"{100 * written['worst']['accuracy']:.1f} %" in done.output
    assert written["samples"] == {"first": 0, "count": 30}
    assert {c["name"] for c in written["checks"]} >= {"gradients", "in the ball", "reproduced from file"}
    assert (folder / "evaluation" / "evaluation.png").stat().st_size > 10_000
    assert not list((folder / "evaluation").glob(".tmp*"))
    other = models.create("small-cnn", 10, (1, 8, 8))
    other.load_state_dict(torch.load(weights, weights_only=True)["state_dict"], strict=True)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(other.eval()(x), network(x))


def test_the_command_refuses_in_one_line(run, tmp_path, monkeypatch):
    folder, _ = run
    for arguments, status, message in (
        ((tmp_path / "nothing",), 1, "no such file"),
        ((folder, "--data", "digits-28"), 2, "takes images"),
        ((folder, "--attacks", "magic"), 2, "no attack 'magic'"),
        ((folder, "--eps", "0"), 2, "eps must be positive"),
    ):
        done = command(*arguments)
        assert done.exit_code == status and message in done.output + done.stderr, (arguments, done.output)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    done = command(folder, "--samples", "5")
    assert done.exit_code == 1 and "pip install 'robustkern[eval]'" in done.output + done.stderr


def test_strict_fails_where_a_check_does(run, monkeypatch):
    from rich.console import Console

    from robustkern.evaluation import suite

    folder, _ = run
    monkeypatch.setattr(suite, "run_checks", lambda subject, training: [Check("doubt", False, "made up")])
    arguments = (folder, "--samples", 10, "--attacks", "pgd", "--pgd-steps", 1, "--check-samples", 5)
    done = command(*arguments, "--strict")
    assert done.exit_code == 1 and "do not trust these accuracies: doubt" in done.output.replace("\n", " ")
    assert command(*arguments).exit_code == 0
    report = evaluate_run(folder, Console(quiet=True), samples=5, attacks=("pgd",), pgd_steps=1, check_samples=5)
    assert not report.sound


def test_a_report_is_written_whole_or_not_at_all(model, digits, tmp_path, monkeypatch):
    from robustkern.evaluation import report as module

    report = evaluate(model, digits, Settings(EPS, samples=10, attacks=("pgd",), pgd_steps=1, check_samples=5))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "figure", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(report, model, tmp_path, {})
    assert not (tmp_path / "evaluation.json").exists()


def test_the_checks_are_named_as_they_name_themselves(model, digits):
    from robustkern.evaluation.checks import _CHECKS

    subject = Subject(model, digits.images[:20], digits.labels[:20], EPS, steps=2)
    for name, check in _CHECKS.items():
        assert check(subject).name == name


def test_export_holds_tensors_alone(model, tmp_path):
    export_state_dict(model, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(loaded) == ["state_dict"] and set(loaded["state_dict"]) == set(model.state_dict())
