"""Batches of an epoch: no avoidable batch of one sample, and none that a model cannot be trained on."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from robustkern import data as datasets
from robustkern import models
from robustkern.training import UsageError, recipe, train
from robustkern.training.batches import batches, check_batches
from robustkern.training.feed import Feed


def test_batches_are_a_partition_without_a_single_sample():
    for count in range(1, 40):
        for size in range(1, 12):
            bounds = batches(count, size)
            assert [i for begin, end in bounds for i in range(begin, end)] == list(range(count))
            sizes = [end - begin for begin, end in bounds]
            assert all(n == size for n in sizes[:-1]) and sizes[-1] <= size + (size > 1)
            assert 1 not in sizes or size == 1 or count == 1


@pytest.mark.usefixtures("no_figures")
def test_a_single_sample_at_the_end_joins_the_batch_before(tmp_path, monkeypatch):
    seen = []
    batch = Feed.batch
    monkeypatch.setattr(Feed, "batch", lambda self, i, *more: seen.append(len(i)) or batch(self, i, *more))
    settings = {"batch_size": 8, "train_samples": 17, "eval_samples": 5, "pgd_steps": 1, "threads": 1}
    train(recipe("digits", model="preact-resnet18", epochs=1, **settings), tmp_path)
    assert seen == [8, 9]


@pytest.mark.parametrize("model", list(models.MODELS))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize(("count", "batch"), [(1, 8), (3, 1), (2, 2)])
def test_batches_too_small_for_batch_norm_are_refused_before_training(model, size, count, batch):
    """Refused are exactly those on which PyTorch would raise."""
    data = datasets.Dataset("tiny", torch.rand(count, 3, size, size), torch.arange(count) % 2, ("a", "b"))
    config = recipe("digits", model=model, batch_size=batch)
    with torch.device("meta"):
        network = models.create(model, 2, data.in_shape).train()
        try:
            for begin, end in batches(count, batch):
                network(torch.empty(end - begin, *data.in_shape))
        except ValueError:
            message = (
                rf"model {model} cannot be trained on \[3, {size}, {size}\] images one at a time .* batch_size {batch}"
            )
            with pytest.raises(UsageError, match=message):
                check_batches(config, data, 1)
            return
    check_batches(config, data, 1)


def test_a_process_that_gets_one_sample_is_refused_too(tmp_path):
    data = datasets.load("digits").first(64)
    config = recipe("digits", model="preact-resnet18", batch_size=8)
    check_batches(config, data, 4)
    with pytest.raises(UsageError, match="processes 8"):
        check_batches(config, data, 8)
    with pytest.raises(UsageError, match="one at a time"):
        train(recipe("digits", model="preact-resnet18", batch_size=1, train_samples=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()
