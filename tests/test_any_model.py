"""Models of other packages, weights of any origin, and smooth activations: in `train`, `evaluate` and `study`."""

import importlib
import json
import sys
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")
pytest.importorskip("typer")
pytest.importorskip("timm")
pytest.importorskip("pyautoattack")

import timm
from safetensors.torch import save_file
from typer.testing import CliRunner

import robustkern as rk
from robustkern import _classifier, data, models, training
from robustkern.cli.app import app
from robustkern.study.given import load_given
from robustkern.training import CheckpointError, Observer, UsageError, recipe, train
from robustkern.training.initial import ModelSpec, initial_model, read_state

pytestmark = pytest.mark.usefixtures("no_figures")
QUICK = {"epochs": 1, "batch_size": 32, "train_samples": 64, "eval_samples": 10, "pgd_steps": 1, "threads": 1}
SMALL = {"model": "timm:vit_tiny_patch16_224", "model_options": {"patch_size": 4, "depth": 2, "embed_dim": 24,
         "num_heads": 2}}  # fmt: skip
MINE = """
from torch import nn

def network(num_classes, width=4, extra=None):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

def wrong():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def classifier():
    return network(10)

def number():
    return 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    (tmp_path / "mine_to_import.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_to_import:network"
    sys.modules.pop("mine_to_import", None)


class Messages(Observer):
    def __init__(self):
        self.seen = []

    def on_message(self, message):
        self.seen.append(message)


def test_a_timm_network_trains_is_loaded_and_begins_another_run(tmp_path):
    messages = Messages()
    first = train(recipe("digits", **SMALL, **QUICK), tmp_path / "first", observer=messages)
    assert messages.seen == []
    model, header = training.load_model(tmp_path / "first")
    x = data.load("digits", split="test").images[:5]
    assert torch.equal(model(x), first.model(x)) and header["model"] == SMALL["model"]
    assert model.network.blocks[0].attn.qkv.in_features == 24

    # As weights of a run with as many classes, of one with others, and of a file of torch.save, wrapped twice.
    state = {f"module.{name}": value for name, value in first.model.network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "wrapped.pt")
    for init in (tmp_path / "first", tmp_path / "wrapped.pt"):
        spec = ModelSpec(SMALL["model"], SMALL["model_options"], str(init))
        again, problem = initial_model(spec, data.load("digits"))
        assert problem == ""
        assert torch.equal(again.network.head.weight, first.model.network.head.weight)
    few = data.Dataset("few", torch.rand(8, 1, 8, 8), torch.arange(8) % 4, tuple("abcd"))
    other, problem = initial_model(ModelSpec(SMALL["model"], SMALL["model_options"], str(tmp_path / "first")), few)
    assert "head.weight [10, 24], not [4, 24], head.bias [10], not [4]" in problem and "keeps its random" in problem
    assert torch.equal(other.network.blocks[0].attn.qkv.weight, first.model.network.blocks[0].attn.qkv.weight)
    assert torch.equal(other.normalize.mean, first.model.normalize.mean)


def test_a_resumed_run_begins_with_the_same_weights(tmp_path):
    settings = {**SMALL, **QUICK, "epochs": 2}
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=3, in_chans=1, img_size=8,
                                **SMALL["model_options"]).state_dict(), tmp_path / "w.safetensors")  # fmt: skip
    config = recipe("digits", "gradient-penalty", init=str(tmp_path / "w.safetensors"), **settings)
    messages = Messages()
    whole = train(config, tmp_path / "whole", observer=messages)
    assert len(messages.seen) == 1 and "head.weight [3, 24], not [10, 24]" in messages.seen[0]
    # The weights are of grey images, for which timm has no statistics: those of the data.
    assert whole.model.normalize.mean.item() == pytest.approx(data.load("digits").first(64).images.mean().item())

    class Stop(BaseException):
        pass

    class Killed(Observer):
        def on_epoch(self, row):
            raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path / "killed", observer=Killed())
    train(config, tmp_path / "killed", resume=True)
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_pretrained_weights_come_with_their_normalisation(tmp_path, monkeypatch):
    """No network: timm is told that the published weights are in a file."""
    published = timm.create_model("test_convnext", num_classes=5)
    torch.save(published.state_dict(), tmp_path / "published.pt")
    create = timm.create_model

    def from_file(name, pretrained, **given):
        overlay = {"file": str(tmp_path / "published.pt"), "num_classes": 5}
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay if pretrained else None, **given)

    monkeypatch.setattr(timm, "create_model", from_file)
    colour = data.Dataset("colour", torch.rand(8, 3, 32, 32), torch.arange(8) % 2, ("a", "b"))
    model, problem = initial_model(ModelSpec("timm:test_convnext", init="pretrained"), colour)
    assert problem == "" and torch.equal(model.network.stem[0].weight, published.stem[0].weight)
    theirs = timm.get_pretrained_cfg("test_convnext")
    assert model.normalize.mean.flatten().tolist() == pytest.approx(theirs.mean)
    assert model.normalize.std.flatten().tolist() == pytest.approx(theirs.std)
    given, _ = initial_model(ModelSpec("timm:test_convnext", {}, "pretrained", "none", (0.1,) * 3, (0.2,) * 3), colour)
    assert given.normalize.mean.flatten().tolist() == pytest.approx([0.1] * 3)


def test_a_function_is_a_model_and_no_file_decides_that_it_is_run(tmp_path, mine):
    config = recipe("digits", model=mine, model_options={"width": 6}, smooth_activations="gelu", **QUICK)
    result = train(config, tmp_path / "run")
    assert isinstance(result.model.network[2], nn.GELU) and result.model.network[1].out_features == 6
    again = training.load_model(tmp_path / "run", mine)[0]
    x = data.load("digits", split="test").images[:3]
    assert torch.equal(again(x), result.model(x))
    with pytest.raises(UsageError, match=r"no file decides which code is run.*--model mine_to_import:network"):
        training.load_model(tmp_path / "run")
    with pytest.raises(UsageError, match="is of model mine_to_import:network, not timm:resnet18"):
        training.load_model(tmp_path / "run", "timm:resnet18")


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("timm:nothing_of_the_kind", {}, "Unknown model"),
        ("timm:resnet18", {"num_classes": 3}, "num_classes is not among its options"),
        ("timm:hf-hub:somebody/something", {}, "no model"),
        ("timm:resnet18", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("small-cnn", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("no_such_module:network", {}, "No module named"),
        ("mine_to_import:absent", {}, "has no attribute 'absent'"),
        ("mine_to_import:number", {}, "is a int, not a torch.nn.Module"),
        ("mine_to_import:wrong", {}, r"gives \[2, 3\] for two images"),
        ("mine_to_import:network", {"width": "x"}, "TypeError"),
    ],
)
def test_bad_models_are_one_sentence_before_anything_is_written(tmp_path, mine, model, options, message):
    with pytest.raises(UsageError, match=message) as error:
        train(recipe("digits", model=model, model_options=options, **QUICK), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_smooth_activations():
    smooth = models.create("timm:resnet18", 10, (3, 32, 32), smooth="silu")
    assert not any(isinstance(module, nn.ReLU) for module in smooth.modules())
    assert sum(isinstance(module, nn.SiLU) for module in smooth.modules()) == 17
    with pytest.raises(ValueError, match="no ReLU module that gelu could replace"):
        models.create("preact-resnet18", 10, (3, 32, 32), smooth="gelu")
    with pytest.raises(UsageError, match="smooth_activations: none, gelu, silu"):
        recipe("digits", smooth_activations="relu")


def test_a_relu_that_is_called_as_a_function_is_told(tmp_path, monkeypatch):
    class Both(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.act, self.linear = nn.ReLU(), nn.Linear(64, num_classes)

        def forward(self, x):
            return torch.relu(self.linear(self.act(x.flatten(1))))

    monkeypatch.setattr(sys.modules[__name__], "Both", Both, raising=False)
    spec = ModelSpec(f"{__name__}:Both", smooth="gelu")
    _, problem = initial_model(spec, data.load("digits"))
    assert "still calls ReLU 1 times, as a function" in problem


def test_weights_that_are_none(tmp_path):
    digits = data.load("digits")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "none.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"a": Messages()}, tmp_path / "code.pt")
    for name, message in (("text.pt", "loaded safely"), ("none.pt", "holds no weights"), ("code.pt", "loaded safely"),
                          ("absent.pt", "no such file")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            read_state(tmp_path / name)
    with pytest.raises(UsageError, match="none of the weights in .* fits the model"):
        initial_model(ModelSpec("small-cnn", init=str(tmp_path / "other.pt")), digits)


def test_evaluate_and_study_take_weights_of_any_origin(tmp_path, mine):
    """A module trained by a loop of one's own, whose weights torch.save wrote."""
    model, digits = importlib.import_module("mine_to_import").classifier(), data.load("digits")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits.images), digits.labels).backward()
        optimizer.step()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    words = ["evaluate", "--model", mine, "--init", "weights.pt", "--data", "digits", "--attacks", "pgd,autoattack",
             "--samples", "12", "--pgd-steps", "2", "--restarts", "1", "--check-samples", "8",
             "--eps", "0.7"]  # fmt: skip
    output = CliRunner().invoke(app, words)
    assert output.exit_code == 0, output.output
    report = json.loads((tmp_path / "evaluation-weights/evaluation.json").read_text())
    test = data.load("digits", split="test").first(12)
    expected = (model(test.images).argmax(1) == test.labels).float().mean().item()
    assert report["clean"]["accuracy"] == pytest.approx(expected) and report["source"]["model"] == mine
    given = load_given(f"{mine}@weights.pt", test)
    assert torch.equal(given(test.images), model(test.images))

    del model[3]
    torch.save(model.state_dict(), tmp_path / "headless.pt")
    output = CliRunner().invoke(app, [*words[:4], "headless.pt", *words[5:]])
    assert output.exit_code == 2 and "are not the model's: missing: 3.weight, 3.bias" in output.stderr
    for wrong, message in (([], "nothing to evaluate"), (["--init", "weights.pt"], "--init belongs to --model"),
                           (words[1:5], "takes --data")):  # fmt: skip
        output = CliRunner().invoke(app, ["evaluate", *wrong])
        assert output.exit_code == 2 and message in output.stderr, output.stderr


def test_losses_warn_once_of_images_normalised_outside_the_model(monkeypatch):
    monkeypatch.setattr(_classifier, "_warned", set())
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), torch.rand(4, 8), torch.arange(4) % 3
    loss = rk.losses.GradientPenalty(eps=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model, x, y)
        rk.losses.CrossEntropy()(model, x - 0.5, y)
    with pytest.warns(UserWarning, match="GradientPenalty: x has values from -"):
        loss(model, x - 0.5, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model, x - 0.5, y)
