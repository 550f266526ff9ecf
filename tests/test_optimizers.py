"""What decays, what learns slower, how the rate rises and falls, and plain training before a method begins."""

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")

from robustkern import models, training
from robustkern.training import recipe, train
from robustkern.training.optimizers import optimizer_of
from robustkern.training.schedule import learning_rate


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


class Network(nn.Module):
    def __init__(self, classes=10, shape=(1, 8, 8)):
        super().__init__()
        self.position, self.stem = nn.Parameter(torch.zeros(8)), nn.Linear(64, 8)
        self.blocks, self.norm, self.head = nn.Sequential(Block(), Block()), nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x.flatten(1)) + self.position)))


def groups(**given):
    model = Network()
    optimizer = optimizer_of(recipe("digits", "standard", optimizer="adamw", weight_decay=0.25, **given), model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


def test_only_matrices_decay():
    of = groups(decay_matrices_only=True, betas=(0.5, 0.75))
    assert {name for name, group in of.items() if group["weight_decay"] == 0.25} == {
        "stem.weight", "blocks.0.linear.weight", "blocks.1.linear.weight", "head.weight"
    }  # fmt: skip
    assert {group["betas"] for group in of.values()} == {(0.5, 0.75)} and len(of) == len(list(Network().parameters()))
    assert {group["weight_decay"] for group in groups().values()} == {0.25}


def test_layers_far_from_the_head_learn_slower():
    scales = {name: group["lr_scale"] for name, group in groups(layer_decay=0.5).items()}
    for begin, scale in {
        "position": 0.125,
        "stem": 0.125,
        "blocks.0": 0.25,
        "blocks.1": 0.5,
        "norm": 1,
        "head": 1,
    }.items():
        assert {value for name, value in scales.items() if name.startswith(begin)} == {scale}, begin
    with pytest.raises(training.UsageError, match="layer_decay takes a network of blocks"):
        optimizer_of(recipe("digits", "standard", layer_decay=0.5), nn.Sequential(nn.Linear(2, 2)))


def test_the_rate_rises_and_falls_to_the_least():
    rates = [learning_rate("cosine", 1.0, step, 20, warm_up=0.25, least=0.1) for step in range(20)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0.1 < rates[-1] < 0.12
    assert learning_rate("step", 1.0, 19, 20, gamma=0.1, least=0.5) == pytest.approx(0.505)
    assert learning_rate("constant", 1.0, 1, 20, warm_up=0.25) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.8, 0.9)}, "betas belong to optimizer adamw"),
        ({"warm_up": 2}, "schedule one-cycle has a rise of its own"),
        ({"warm_up": 40, "schedule": "cosine"}, "warm_up must be less than the 40 epochs"),
        ({"least_lr": 1.0}, "least_lr must be at most lr"),
    ],
)
def test_what_makes_no_sense_is_refused(given, message):
    with pytest.raises(training.UsageError, match=message):
        recipe("digits", "standard", **given)


def test_a_run_begins_with_plain_training_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "network", Network)
    monkeypatch.setattr(training.run_folder.RunFolder, "draw", lambda *_: None)
    given = {"epochs": 3, "batch_size": 16, "train_samples": 64, "eval_samples": 10, "pgd_steps": 1, "threads": 1,
             "lr": 0.01, "model": "network", "optimizer": "adamw", "schedule": "cosine"}  # fmt: skip
    settings = {**given, "warm_up": 1, "least_lr": 1e-3, "layer_decay": 0.75, "decay_matrices_only": True}
    plain = recipe("digits", "trades", plain_epochs=2, options={"steps": 1}, **settings)
    whole = train(plain, tmp_path / "whole")
    assert [row["smoothness"] is None for row in whole.rows] == [True, True, False]
    standard = train(recipe("digits", "standard", **settings), tmp_path / "standard").rows
    assert [row["orientation"] for row in whole.rows[:2]] == [row["orientation"] for row in standard[:2]]

    class Stop(training.Observer):
        def on_epoch(self, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(plain, tmp_path / "again", observer=Stop())
    train(plain, tmp_path / "again", resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
