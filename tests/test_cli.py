"""The command line: what it does, what it says when it is used wrongly, and what works without the extras."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")

import yaml
from typer.testing import CliRunner

from robustkern import training
from robustkern.cli import demo as demo_module
from robustkern.cli import info, step_cost
from robustkern.cli.app import app
from robustkern.cli.errors import STOPPED
from robustkern.training import build_loss

FAST = ["--epochs", "1", "--train-samples", "96", "--batch-size", "32", "--eval-samples", "20", "--threads", "1"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result):
    """The one line that went to stderr."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("robustkern: "), result.stderr
    return lines[0]


@pytest.mark.usefixtures("no_figures")
def test_train_prints_a_row_per_epoch_and_writes_its_configuration(tmp_path):
    arguments = ["--data", "digits", "--method", "gradient-penalty", "--eps", "32/255", "--weight", "0.5", "-p", "2"]
    result = run("train", *arguments, *FAST, "--epochs", "2", "--seed", "3", "--lr", "0.02", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "orientation" in result.stdout and "PGD-20" in result.stdout and "ms/step" in result.stdout
    assert "1/2" in result.stdout and "2/2" in result.stdout and "eps 32/255" in result.stdout
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["eps"] == pytest.approx(32 / 255) and written["seed"] == 3 and written["lr"] == 0.02
    assert written["options"]["weight"] == 0.5 and written["options"]["norm"] == 2.0


@pytest.mark.usefixtures("no_figures")
def test_train_with_random_projections(tmp_path):
    options = ["--projections", "3", "--law", "sphere", "--every", "2", "--fraction", "0.5"]
    result = run("train", "--method", "jacobian", *options, *FAST, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "projections 3, law sphere, every 2, fraction 0.5" in result.stdout
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["options"]
    assert {"projections": 3, "law": "sphere", "every": 2, "fraction": 0.5}.items() <= written.items()


@pytest.mark.usefixtures("no_figures")
def test_train_with_other_options_of_the_method(tmp_path):
    options = ["--set", "step_size=2/255", "--set", "steps=2", "--weight", "0.5"]
    result = run("train", "--method", "pgd", *options, *FAST, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["options"]
    assert {"step_size": 2 / 255, "steps": 2, "weight": 0.5}.items() <= written.items()
    assert run("train", "--resume", "--set", "steps=2", "--out", tmp_path / "run").exit_code == 0
    assert run("train", "--set", "steps", "--out", tmp_path / "other").exit_code == 2


@pytest.mark.usefixtures("no_figures")
def test_resume_takes_its_settings_from_the_run_and_refuses_others(tmp_path):
    out = tmp_path / "run"
    assert run("train", "--method", "standard", *FAST, "--out", out).exit_code == 0
    again = run("train", "--resume", "--out", out)
    assert again.exit_code == 0 and "going on after step 3" in again.stdout
    assert run("train", "--resume", "--method", "standard", *FAST, "--out", out).exit_code == 0
    changed = run("train", "--resume", "--out", out, "--lr", "0.9", "--epochs", "5")
    assert changed.exit_code == 2
    assert "epochs 1 -> 5" in one_line(changed) and "lr 0.1 -> 0.9" in one_line(changed)
    assert "no option weight" in one_line(run("train", "--resume", "--out", out, "--weight", "3"))
    existing = run("train", "--method", "standard", *FAST, "--out", out)
    assert existing.exit_code == 2 and "--resume" in one_line(existing)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--data", "imagenet"], 2, "no data set 'imagenet'"),
        (["--method", "magic"], 2, "no method 'magic'"),
        (["--model", "vgg"], 2, "no model 'vgg'"),
        (["--eps", "8"], 2, "such as 8/255"),
        (["--method", "standard", "--weight", "1"], 2, "no option weight"),
        (["--norm", "0.5"], 2, "'--norm' / '-p': must be a number in [1, inf], got '0.5'"),
        (["--weight", "-1"], 2, "Invalid value for '--weight': must be a number in [0, inf), got '-1'"),
        (["--method", "jacobian", "--projections", "-1"], 2, "'--projections': must be an integer from 0 to 1000000"),
        (["--method", "fisher", "--law", "uniform"], 2, "law must be one of 'sphere', 'gaussian'"),
        (["--method", "jacobian", "--every", "0"], 2, "'--every': must be an integer from 1 to 2147483647"),
        (["--method", "cross-lipschitz", "--fraction", "0"], 2, "'--fraction': must be a number in (0, 1], got '0'"),
        (["--method", "jacobian", "--norm", "2"], 2, "method jacobian has no option norm"),
        (["--method", "pgd", "--set", "step=2/255"], 2, "method pgd has no option step (it has: steps, step_size"),
        (["--method", "pgd", "--set", "steps=many"], 2, "option steps of method pgd must be an integer, got 'many'"),
        (["--method", "pgd", "--set", "steps=7.9"], 2, "option steps of method pgd must be an integer, got '7.9'"),
        (["--method", "jacobian", "--projections", "20"], 2, "projections must be at most 10 for law orthonormal"),
        (["--epochs", "0"], 2, "'--epochs': must be an integer from 1 to 2147483647, got '0'"),
        (["--optimizer", "lion"], 2, "no optimizer"),
        (["--impl", "fast"], 2, "impl"),
        (["--data", "cifar10"], 1, "cifar-10-python.tar.gz"),
        (["--root", "/nonexistent", "--data", "cifar10"], 1, "no such folder"),
    ],
)
def test_wrong_use_is_one_line_and_a_status(tmp_path, arguments, status, message):
    result = run("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == status and message in one_line(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_teacher_of_other_images_or_classes_is_refused(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    assert run("train", "--method", "standard", *FAST, "--out", tmp_path / "teacher").exit_code == 0
    command = ["train", "--method", "distillation", "--set", f"teacher={tmp_path / 'teacher'}", *FAST]
    other = run(*command, "--data", "digits-28", "--out", tmp_path / "run")
    assert other.exit_code == 2 and "digits-28 has [1, 28, 28] of 10 classes (0, 1, 2, ...)" in one_line(other)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            image_module.new("L", (8, 8)).save(tmp_path / "pets" / split / name / "1.png")
    other = run(*command, "--data", tmp_path / "pets", "--out", tmp_path / "run")
    assert other.exit_code == 2 and "of 2 classes (cat, dog)" in one_line(other)
    assert not (tmp_path / "run").exists()
    assert run(*command, "--out", tmp_path / "run").exit_code == 0


@pytest.mark.parametrize("arguments", [["--eps", "8/x"], ["--eps", "1/0"], ["--epochs", "many"], ["--colour"]])
def test_arguments_that_cannot_be_parsed(arguments):
    result = run("train", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_the_out_path_must_be_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert run("train", *FAST, "--out", tmp_path / "file").exit_code == 2
    below = run("train", *FAST, "--out", tmp_path / "file" / "run")
    assert below.exit_code == 1 and "Not a directory" in one_line(below)


@pytest.mark.long
def test_demo_shows_both_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo_module.step_cost, "measure", quick_measure)
    result = run("demo", "--out", tmp_path / "demo", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "cross-entropy" in result.stdout and "robust" in result.stdout and "robustkern" in result.stdout
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert list(rows) == ["standard", "gradient-penalty"]
    for row in rows.values():
        assert 0 <= row["robust_accuracy"] <= 1 and set(row["step"]) == {"reference", "kernel"}
    for name in ("gradients.png", "curves.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")


measure = step_cost.measure


def quick_measure(*args, **kwargs):
    return measure(*args, **{**kwargs, "seconds": 0.0})


def test_step_cost_divides_by_the_baseline_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    losses = {name: build_loss(name, {}, eps=0.1, impl="reference") for name in ("standard", "gradient-penalty")}
    costs = measure(model, torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), losses, "standard", seconds=0.0)
    assert costs["standard"].ratio == 1.0 and costs["gradient-penalty"].milliseconds > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_below_knows_the_command_line():
    package = Path(training.__file__).parents[1]
    for path in {*package.rglob("*.py")} - {*package.glob("cli/*.py"), package / "__main__.py"}:
        assert not re.search(r"robustkern\.cli|from \.+cli|import cli", path.read_text()), path


# --- as a process -----------------------------------------------------------------------------------------------------


def process(*arguments, **kwargs):
    command = [sys.executable, "-m", "robustkern", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.long
def test_sigterm_then_sigkill_then_resume_ends_with_the_same_bits(tmp_path):
    arguments = ["train", "--epochs", "4", "--train-samples", "512", "--eval-samples", "20", "--resume"]
    whole = process(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "stopped"
    for number, status in ((signal.SIGTERM, STOPPED), (signal.SIGKILL, -signal.SIGKILL)):
        stopped = process(*arguments, "--out", out)
        before = sorted(out.glob("checkpoint-*.json"))
        while stopped.poll() is None and sorted(out.glob("checkpoint-*.json")) == before:
            time.sleep(0.01)
        stopped.send_signal(number)
        _, errors = stopped.communicate(timeout=300)
        assert stopped.returncode == status, errors
        if number == signal.SIGTERM:
            assert "SIGTERM" in errors and "--resume" in errors and len(errors.strip().splitlines()) == 1
    finished = process(*arguments, "--out", out)
    assert finished.wait(timeout=300) == 0 == whole.wait(timeout=300)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# Blocks the extras, as if they were not installed, then runs the command line.
WITHOUT_EXTRAS = """
import runpy, sys
for name in ("typer", "rich", "matplotlib", "sklearn", "safetensors", "yaml", "PIL"):
    sys.modules[name] = None
sys.argv = ["robustkern", *sys.argv[1:]]
runpy.run_module("robustkern", run_name="__main__")
"""


@pytest.mark.long
def test_info_works_without_the_extras():
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, "info"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(None, 1) for line in result.stdout.splitlines() if line and not line.startswith(" "))
    for name in ("robustkern", "python", "torch", "numpy", "compiler", "system", "cpu", "vectors", "gpu"):
        assert facts[name].strip(), name
    assert facts["torch"].startswith(torch.__version__)
    assert "loaded" in facts["robustkern._C"] and "loaded" in facts["robustkern._cuda"]


@pytest.mark.long
@pytest.mark.parametrize("command", ["train", "demo"])
def test_everything_else_names_the_extra_in_one_sentence(command):
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, command], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert "pip install typer" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.long
def test_importing_robustkern_imports_no_extra():
    code = "import sys, robustkern; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"typer", "rich", "matplotlib", "sklearn", "safetensors", "yaml"} & set(result.stdout.split())


def test_info_through_typer_and_its_errors(capsys):
    result = run("info")
    assert result.exit_code == 0
    assert info.run(["--verbose"]) == 2 and "takes no arguments" in capsys.readouterr().err


def test_info_never_fails_where_something_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    facts = info.collect()
    assert facts["compiler"] == "none found" and facts["nvcc"] == "none found"
    broken = tmp_path / "c++"
    broken.write_text("not a program")
    broken.chmod(0o755)
    assert "does not run" in info.collect()["compiler"]


def test_help_and_no_arguments():
    assert "train" in run("--help").stdout and "demo" in run("-h").stdout
    assert "Usage" in run().output
