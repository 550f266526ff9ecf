"""Folders that are written into: empty or ours; locks that harm no file; runs, evaluations and names that never mix."""

import errno
import fcntl
import json
import os
import signal
import threading

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")
pytest.importorskip("PIL")

from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from robustkern import data, models
from robustkern.cli import demo
from robustkern.cli import evaluate as command
from robustkern.cli.app import app
from robustkern.evaluation import suite
from robustkern.study import Plan
from robustkern.study import run as run_study
from robustkern.study.given import load_given
from robustkern.training import CheckpointError, Interrupted, TrainingError, UsageError, recipe, save_weights, train
from robustkern.training.files import RunLock
from robustkern.training.weights import load_model_for

CLASSES = [str(digit) for digit in range(10)]
QUICK = {"samples": 80, "attacks": ("pgd", "apgd"), "pgd_steps": 1, "restarts": 1, "apgd_steps": 2, "check_samples": 4}


pytestmark = pytest.mark.usefixtures("no_figures")


def config(method="standard", **given):
    small = {"epochs": 2, "train_samples": 64, "batch_size": 32, "eval_samples": 5, "pgd_steps": 1, "threads": 1}
    return recipe("digits", method, **{**small, **given})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def weights(folder, classes=CLASSES, shape=(1, 8, 8)):
    torch.manual_seed(0)
    model = models.create("small-cnn", len(classes), shape)
    folder.mkdir(parents=True, exist_ok=True)
    description = {"model": "small-cnn", "classes": classes, "in_shape": list(shape), "data": "digits", "eps": 0.1}
    save_weights(folder / "model.safetensors", model, description)
    return folder


# --- the lock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "text", "folder", "pipe"])
def test_a_lock_that_is_no_lock_is_refused_and_left_alone(tmp_path, kind):
    precious = tmp_path / "precious"
    precious.write_text("12345")
    folder = tmp_path / "run"
    folder.mkdir()
    lock = folder / ".lock"
    {
        "link": lambda: lock.symlink_to(precious),
        "dangling link": lambda: lock.symlink_to(tmp_path / "nowhere"),
        "hard link": lambda: os.link(precious, lock),
        "text": lambda: lock.write_text("my notes"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(UsageError, match=r"\.lock is no file of ours"):
        train(config(), folder)
    assert precious.read_text() == "12345" and not (tmp_path / "nowhere").exists()
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert kind != "text" or lock.read_text() == "my notes"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_not_in_use(tmp_path, monkeypatch, number):
    def flock(descriptor, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(TrainingError, match=r"cannot be locked \(.*no locks, choose another folder") as caught:
        train(config(), tmp_path)
    assert "in use" not in str(caught.value)


def test_the_lock_of_an_earlier_version_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text("4194304\n")
    with RunLock(tmp_path), pytest.raises(UsageError, match=f"pid {os.getpid()}"), RunLock(tmp_path):
        pass


# --- folders ----------------------------------------------------------------------------------------------------------


def write_everything(out):
    """Runs each command that writes into a folder, briefly."""
    demo_arguments = (out, "digits", Console(quiet=True))
    return {
        "train": lambda: train(config(epochs=1), out),
        "resume": lambda: train(config(epochs=1), out, resume=True),
        "evaluate": lambda: command.evaluate_run(weights(out.parent / "run"), Console(quiet=True), out=out, **QUICK),
        "study": lambda: run_study(Plan("digits", methods=("standard",), seeds=1, epochs=1), out),
        "demo": lambda: demo.run_demo(*demo_arguments, epochs=1),
    }


@pytest.mark.parametrize("name", ["train", "resume", "evaluate", "study", "demo"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, name):
    out = tmp_path / "theirs"
    out.mkdir()
    for file in ("results.json", "notes.txt", ".tmp-of-my-editor", "model.safetensors"):
        (out / file).write_text("theirs")
    before = contents(out)
    with pytest.raises(UsageError, match="neither empty nor") as caught:
        write_everything(out)[name]()
    assert contents(out) == before and not (out / ".lock").exists() and "\n" not in str(caught.value)
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        write_everything(tmp_path / "file")[name]()


def test_temporary_files_of_others_stay(tmp_path):
    train(config(epochs=1), tmp_path)
    (tmp_path / ".tmp-mine").write_text("mine")
    (tmp_path / ".tmp-model.safetensors-a1b2c3d4").write_text("of a run that was killed")
    train(config(epochs=1), tmp_path, resume=True)
    assert [path.name for path in tmp_path.glob(".tmp-*")] == [".tmp-mine"]


# --- what a checkpoint belongs to -------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_two_methods_never_mix_in_a_folder(tmp_path, finished, resume):
    train(config(), tmp_path)
    if not finished:
        for name in ("results.json", "model.safetensors"):
            (tmp_path / name).unlink()
    mine, theirs = config(), config("gradient-penalty")
    (tmp_path / "config.yaml").rename(tmp_path / "config.yaml.bak")
    before = contents(tmp_path)
    for settings in (mine, theirs):
        with pytest.raises(UsageError, match="holds checkpoints, but not their config.yaml"):
            train(settings, tmp_path, resume=resume)
    assert contents(tmp_path) == before
    (tmp_path / "config.yaml").write_text(theirs.to_yaml())
    before = contents(tmp_path)
    with pytest.raises(
        UsageError, match="written with other settings: method standard -> gradient-penalty|pass --resume"
    ):
        train(theirs, tmp_path, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "setting", [{"seed": 1}, {"lr": 0.2}, {"epochs": 3}, {"options": {"label_smoothing": 0.1}}], ids=str
)
def test_a_configuration_that_was_changed_by_hand_is_refused(tmp_path, setting):
    train(config(), tmp_path)
    (tmp_path / "config.yaml").write_text(config(**setting).to_yaml())
    with pytest.raises(UsageError, match=r"checkpoint-000000004.pt was written with other settings: .* -> "):
        train(config(**setting), tmp_path, resume=True)


def test_a_run_without_checkpoints_is_not_begun_anew(tmp_path):
    train(config(), tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="holds model.safetensors, but no checkpoint to go on from"):
        train(config(), tmp_path, resume=True)
    assert contents(tmp_path) == before


def put_images(folder, classes="ab", size=8, mode="L"):
    """Writes two images of each class; returns the folder."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new(mode, (size, size), number).save(folder / name / f"{number}.png")
    return folder


def test_a_run_does_not_go_on_with_other_samples(tmp_path):
    """The order of its samples and the number of steps per epoch would change."""
    for split in ("train", "test"):
        put_images(tmp_path / "data" / split)
    settings = recipe(str(tmp_path / "data"), "standard", epochs=1, pgd_steps=1, threads=1)
    train(settings, tmp_path / "run")
    (tmp_path / "data" / "train" / "a" / "1.png").rename(tmp_path / "data" / "train" / "b" / "2.png")
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"checkpoint-000000001.pt belongs to another architecture or data set"):
        train(settings, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("test", [{"size": 9}, {"mode": "RGB"}], ids=str)
def test_images_of_two_shapes_are_refused_before_training(tmp_path, test):
    put_images(tmp_path / "data" / "train")
    put_images(tmp_path / "data" / "test", **test)
    with pytest.raises(data.DataError, match=r"to train on \[C, H, W\] are \[1, 8, 8\], but those to test on \["):
        train(recipe(str(tmp_path / "data"), "standard", epochs=1, pgd_steps=1, threads=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_manifest_without_a_configuration_is_refused(tmp_path):
    train(config(), tmp_path)
    for path in tmp_path.glob("checkpoint-*.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "config": "method: pgd"}))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used: .* is damaged"):
        train(config(), tmp_path, resume=True)


# --- names of classes -------------------------------------------------------------------------------------------------

OTHERS = {
    "other names": ("b", "c"),
    "another order": ("b", "a"),
    "more": ("a", "b", "c"),
    "the same with a space": ("a", "b "),
}


@pytest.mark.parametrize("classes", OTHERS.values(), ids=OTHERS)
def test_classes_of_other_names_are_refused_wherever_a_model_meets_data(tmp_path, classes, monkeypatch):
    run = weights(tmp_path / "run", ["a", "b"])
    other = data.Dataset("theirs", torch.rand(4, 1, 8, 8), torch.arange(4) % 2, classes)
    monkeypatch.setattr(data, "load", lambda *arguments: other)
    message = r"run takes images \[1, 8, 8\] of 2 classes \(a, b\), theirs has \[1, 8, 8\] of \d classes \(.*\)$"
    for meeting in (
        lambda: load_model_for(run, other),
        lambda: load_given(str(run), other),
        lambda: command.evaluate_run(run, Console(quiet=True), data="theirs", **QUICK),
        lambda: train(config("distillation", options={"teacher": str(run)}), tmp_path / "pupil"),
        lambda: run_study(
            Plan("digits", methods=(), sweep=(), two_by_two=False, given=(("x", str(run)),)), tmp_path / "s"
        ),
    ):
        with pytest.raises(UsageError, match=message):
            meeting()
    assert {path.name for path in tmp_path.iterdir()} == {"run"} and {p.name for p in run.iterdir()} == {
        "model.safetensors"
    }


def test_names_that_part_late_are_shown(tmp_path):
    mine, theirs = [f"c{i}" for i in range(100)], tuple(f"c{i}" if i != 70 else "other" for i in range(100))
    run = weights(tmp_path / "run", mine)
    images = data.Dataset("theirs", torch.rand(4, 1, 8, 8), torch.arange(4), theirs)
    with pytest.raises(UsageError, match=r"\(\.\.\., c68, c69, c70, c71, c72, \.\.\.\), .*c69, other, c71"):
        load_model_for(run, images)


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluated(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize("trouble", ["not writable", "a folder in the way", "in use", "export"])
def test_a_folder_that_cannot_be_written_is_found_before_any_attack(tmp_path, monkeypatch, trouble):
    run, out, more = weights(tmp_path / "run"), tmp_path / "out", ()
    out.mkdir()
    monkeypatch.setattr(suite, "_attack_all", None)
    if trouble == "not writable":  # for root too

        def mkstemp(**where):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(where["dir"]))

        monkeypatch.setattr("tempfile.mkstemp", mkstemp)
    elif trouble == "a folder in the way":
        (out / "evaluation.png").mkdir()
    elif trouble == "export":
        more = ("--export", tmp_path / "nowhere" / "weights.pt")
    lock = RunLock(out)
    if trouble == "in use":
        lock.__enter__()
    result = evaluated(run, "--attacks", "pgd", "--out", out, *more)
    lock.__exit__(None, None, None)
    assert result.exit_code in (1, 2) and result.stderr.count("\n") == 1, result.output
    expected = {
        "not writable": "Read-only",
        "a folder in the way": "is a folder",
        "in use": "in use",
        "export": "nowhere",
    }
    assert expected[trouble] in result.stderr
    assert not (out / "evaluation.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_attacks_that_were_finished(tmp_path, monkeypatch, number):
    run = weights(tmp_path / "run")
    attack = suite.APGD.__call__

    def interrupted(self, *arguments, **more):
        if self.loss != "ce":
            os.kill(os.getpid(), number)
            threading.Event().wait(5)  # the signal ends it
            raise AssertionError("nobody was interrupted")
        return attack(self, *arguments, **more)

    monkeypatch.setattr(suite.APGD, "__call__", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"evaluation/ has what was finished \(PGD-1x1, APGD-CE\)"):
        command.evaluate_run(run, Console(quiet=True), **QUICK)
    assert signal.getsignal(number) is before
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [found["name"] for found in written["attacks"]] == ["PGD-1x1", "APGD-CE"]
    assert written["finished"] is False and written["sound"] is None and written["worst"]["samples"] == 80
    monkeypatch.setattr(suite.APGD, "__call__", attack)
    command.evaluate_run(run, Console(quiet=True), **QUICK)  # the same command begins anew
    assert json.loads((run / "evaluation" / "evaluation.json").read_text())["finished"] is True
    assert {path.name for path in (run / "evaluation").iterdir()} == {*command.FILES, ".lock"}


def test_a_signal_is_status_75(tmp_path, monkeypatch):
    run = weights(tmp_path / "run")

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite.PGD, "__call__", interrupted)
    result = evaluated(run, "--samples", 80, "--attacks", "pgd")
    assert result.exit_code == 75 and "no attack was finished" in result.stderr and result.stderr.count("\n") == 1


def test_the_report_folder_of_a_study_is_tried_before_anything_is_trained(tmp_path):
    (tmp_path / "report").write_text("a file")
    arguments = [
        "study",
        "--data",
        "digits",
        "--methods",
        "standard",
        "--out",
        tmp_path / "s",
        "--report",
        tmp_path / "report",
    ]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1 and "report: File exists" in result.stderr and not (tmp_path / "s").exists()
