"""`robustkern evaluate`: files, messages, exit status."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from robustkern import data, models
from robustkern.cli.evaluate import evaluate_run
from robustkern.evaluation import Check
from robustkern.training import save_weights

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def trained(network, train, steps):
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    network.train()
    for step in range(steps):
        x, y = train.images[step * 30 : step * 30 + 30], train.labels[step * 30 : step * 30 + 30]
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


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

    from robustkern.cli.app import app

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


def test_every_file_of_weights_has_an_evaluation_of_its_own(run, tmp_path):
    folder, _ = run
    content = (folder / "model.safetensors").read_bytes()
    for name in ("model", "best"):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    options = ["--samples", 5, "--attacks", "pgd", "--pgd-steps", 1, "--restarts", 1, "--check-samples", 5]
    for weights in (tmp_path, tmp_path / "best.safetensors", tmp_path / "model.safetensors"):
        assert command(weights, *options).exit_code == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "evaluation", "evaluation-best", "evaluation-model"
    }  # fmt: skip
    source = json.loads((tmp_path / "evaluation-best" / "evaluation.json").read_text())["source"]
    assert source["run"].endswith("best.safetensors")


def test_the_command_refuses_in_one_line(run, tmp_path, monkeypatch):
    folder, _ = run
    for arguments, status, message in (
        ((tmp_path / "nothing",), 1, "no such file"),
        ((folder, "--data", "digits-28"), 2, "takes images"),
        ((folder, "--attacks", "magic"), 2, "no attack 'magic'"),
        ((folder, "--eps", "0"), 2, "'--eps': must be a number in (0, inf), got '0'"),
    ):
        done = command(*arguments)
        assert done.exit_code == status and message in done.output + done.stderr, (arguments, done.output)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    done = command(folder, "--samples", "5")
    assert done.exit_code == 1 and "pip install pyautoattack" in done.output + done.stderr


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


@pytest.mark.parametrize("some", [False, True])
def test_where_nothing_is_right_nothing_is_checked(tmp_path, some):
    """A constant network is right for none of the images, or for none of those that the checks attack."""
    labels = data.load("digits", split="test").labels[:30].tolist()
    constant = models.create("small-cnn", 10, (1, 8, 8))
    chosen = next(label for label in range(10) if label not in labels[:5] and label in labels)
    samples = 30 if some else labels.index(chosen)
    with torch.no_grad():
        last = constant.network.classifier[-1]
        last.weight.zero_()
        last.bias.copy_(torch.eye(10)[chosen])
    classes = [str(i) for i in range(10)]
    description = {"model": "small-cnn", "classes": classes, "in_shape": [1, 8, 8], "data": "digits", "eps": 0.07}
    save_weights(tmp_path / "model.safetensors", constant, description)
    options = ["--samples", samples, "--attacks", "pgd", "--pgd-steps", 1, "--restarts", 1, "--check-samples", 5]
    done = command(tmp_path, *options)
    assert done.exit_code == 0 and "nothing to check: none of the first 5 images is classified right" in done.output
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert (written["clean"]["right"] > 0) == some
    assert written["sound"] is False and written["unchecked"] == "none of the first 5 images is classified right"
    marks = ["in the ball", "reproduced from file"] if some else []  # what the attacks on the others left
    assert [check["name"] for check in written["checks"]] == marks and ("✓" in done.output) == some
    assert command(tmp_path, *options, "--strict").exit_code == 1
