"""Settings that trade time for memory: they change no result but by rounding."""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")

from robustkern import models, training
from robustkern.training import recipe, train

# Rounding errors, magnified by a few steps.
ROUNDING = 1e-4


class Block(nn.Module):
    calls = 0

    def __init__(self, dropout):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(dropout)

    def forward(self, x):
        Block.calls += 1
        return x + nn.functional.silu(self.norm(self.conv(self.drop(x))))


def network(classes, shape, dropout=0.1):
    stem, blocks = nn.Conv2d(shape[0], 8, 2, 2), [Block(dropout), Block(dropout)]
    return nn.Sequential(stem, *blocks, nn.Flatten(), nn.Linear(128, classes))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "blocks", network)
    flat = lambda classes, shape: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))  # noqa: E731
    monkeypatch.setitem(models.MODELS, "normalised", flat)
    monkeypatch.setattr(training.run_folder.RunFolder, "draw", lambda *_: None)

    def call(name, method="gradient-penalty", **given):
        settings = {"model": "blocks", "epochs": 2, "batch_size": 16, "train_samples": 64, "eval_samples": 10,
                    "pgd_steps": 1, "threads": 1, "lr": 0.02, **given}  # fmt: skip
        Block.calls = 0
        torch.manual_seed(1)  # of the dropout
        state = train(recipe("digits", method, **settings), tmp_path / name).model.state_dict()
        return {key: value.double() for key, value in state.items()}, Block.calls

    return call


def distance(one, other):
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize("method", ["gradient-penalty", "trades"])
def test_blocks_that_are_computed_again(run, method):
    options = {"steps": 2} if method == "trades" else {}
    (plain, calls), (saving, more) = (run(f"{on}", method, recompute=on, options=options) for on in (False, True))
    assert more > calls
    assert distance(plain, saving) < ROUNDING  # BatchNorm's statistics, and dropout's masks in them, included


def test_a_network_without_blocks_has_nothing_to_compute_again(run):
    with pytest.raises(training.UsageError, match="recompute takes a network of blocks"):
        run("run", model="small-cnn", recompute=True)


def test_channels_last(run, monkeypatch):
    monkeypatch.setitem(models.MODELS, "blocks", partial(network, dropout=0.0))  # which draws in memory order
    seen = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (
            seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
            if isinstance(module, nn.Conv2d)
            else None
        )
    )
    try:
        (plain, _), (last, _) = (run(f"{on}", channels_last=on) for on in (False, True))
    finally:
        hook.remove()
    assert distance(plain, last) < ROUNDING
    assert seen[-1]


def test_parts_of_a_batch(run):
    """Every sample draws its own numbers in whatever part it is."""
    given = {"model": "small-cnn", "options": {"projections": 1, "fraction": 0.5}}
    (whole, _), (parts, _) = (run(f"{count}", "jacobian", accumulate=count, **given) for count in (1, 3))
    assert distance(whole, parts) < ROUNDING


def test_a_part_of_one_sample_is_refused_where_batch_norm_needs_two(run):
    with pytest.raises(training.UsageError, match="one at a time .* accumulate 16"):
        run("run", model="normalised", accumulate=16)
