"""A study, small: trained, measured, drawn, stopped, gone on with."""

import json
import re
from functools import partial

import pytest
import torch

from robustkern import data
from robustkern.attacks import PGD
from robustkern.study import command, figures, inversion
from robustkern.study import study as module
from robustkern.study.measures import MEASURES, Protocol
from robustkern.study.study import OURS, PAPER, Plan, configuration, run
from robustkern.training import METHODS, UsageError, train

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
SMALL = {"data": "digits", "methods": ("standard", "fgsm"), "seeds": 1, "sweep": (3.0,), "samples": 12, "epochs": 1}


def study(*arguments):
    from typer.testing import CliRunner

    from robustkern.cli import app

    return CliRunner().invoke(app, ["study", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few steps: what they lead to is measured elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        quick = partial(Protocol, seeds_per_class=1, noise_images=1, noise_steps=2, inversion_steps=2)
        patch.setattr(module, "Protocol", quick)
        patch.setattr(
            figures, "invert", lambda *images, **options: inversion.invert(*images, **{**options, "steps": 1})
        )
        patch.setattr(figures, "PGD", lambda eps, **options: PGD(eps, **{**options, "steps": 1}))
        for picture in ("curves", "gradients"):  # of each training; the report has its own
            patch.setattr(f"robustkern.training.figures.{picture}", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    options = ["--data", "digits", "--methods", "standard,fgsm", "--seeds", 1, "--sweep", "3", "--samples", 12]
    result = study(*options, "--epochs", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_study_leaves_every_number_and_figure(done):
    folder, output = done
    written = json.loads((folder / "study.json").read_text())
    names = [
        "standard", "fgsm", "gradient-penalty", "gradient-penalty x 3", "standard, labels shuffled",
        "gradient-penalty, labels shuffled",
    ]  # fmt: skip
    assert list(written["summary"]) == names
    for measures in written["summary"].values():
        assert list(measures) == list(MEASURES)
        for values in measures.values():
            assert values["low"] <= values["mean"] <= values["high"] and len(values["seeds"]) == 1
    page = (folder / "report.html").read_text()
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {"gradients", "inversions", "noise", "perturbations", "terms", "smoothness", "two_by_two"}
    assert len(re.findall("data:image/png;base64,", page)) == len(figures)
    assert all(name in page for name in names)
    assert "http" not in page  # needs nothing beside it
    assert "robustkern study --data digits --seeds 1 --samples 12 --epochs 1 --methods standard,fgsm --sweep 3" in page
    assert "report.html" in output and "about" in output


def test_what_is_there_is_not_made_again(done, monkeypatch):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("measures/*")}
    summary = json.loads((folder / "study.json").read_text())["summary"]
    (gone,) = [path for path in before if path.stem == "fgsm-0"]
    gone.unlink()
    again = run(Plan(**SMALL), folder)
    assert {path for path in folder.glob("measures/*") if path.stat().st_mtime_ns != before.get(path)} == {gone}
    assert again.summary == summary  # measured again, to the same numbers


def test_a_folder_belongs_to_one_study(done):
    folder, _ = done
    with pytest.raises(UsageError, match=r"holds another study \(epochs 1 -> 2\): choose another folder"):
        run(Plan(**{**SMALL, "epochs": 2}), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "standard,magic"], "no method 'magic' in the study"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--sweep", "1,x"], "--sweep: numbers with commas, or none"),
        (["--sweep", "-1"], "multiples must be positive"),
    ],
)
def test_misuse_is_one_line(options, message, tmp_path):
    result = study("--data", "digits", "--out", tmp_path / "study", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_every_kind_of_model_has_a_configuration(tmp_path):
    plan = Plan("digits")
    entries = {entry.name: entry for entry in plan.entries()}
    assert set(PAPER + OURS) <= set(entries)
    configurations = {name: configuration(plan, entry, 2, tmp_path) for name, entry in entries.items()}
    assert all(config.method in METHODS and config.seed == 2 for config in configurations.values())
    assert configurations["distillation"].options["teacher"] == str(tmp_path.resolve() / "models" / "standard-2")
    assert configurations["gradient-penalty-linf"].options["norm"] == float("inf")
    usual = configurations["gradient-penalty"].options["weight"]
    assert configurations["gradient-penalty x 0.1"].options["weight"] == pytest.approx(0.1 * usual)
    shuffled = {name for name, config in configurations.items() if config.shuffle_labels}
    assert shuffled == {"standard, labels shuffled", "gradient-penalty, labels shuffled"}


def test_a_teacher_is_trained_before_its_pupil():
    for plan in (Plan("digits", methods=("distillation",), sweep=(), two_by_two=False), Plan("digits")):
        names = [entry.name for entry in plan.entries()]
        assert names.index("standard") < names.index("distillation")


def test_shuffled_labels_are_the_same_labels_in_another_order(tmp_path):
    images = data.load("digits")
    first, again, other = (images.with_shuffled_labels(seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, images.images)
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    assert torch.equal(first.labels.bincount(), images.labels.bincount())
    assert 0.05 < float((first.labels == images.labels).float().mean()) < 0.15
    config = configuration(Plan("digits", epochs=2), Plan("digits").entries()[-2], 0, tmp_path)
    result = train(config, tmp_path / "run")
    assert result.accuracies["last"]["clean_accuracy"] < 0.3


def test_sweep():
    assert command._sweep("none") == ()
    assert command._sweep("0.5, 2") == (0.5, 2.0)
