"""What a batch is made of: extra samples, augmentation and mixing, each a function of (seed, epoch, sample)."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("kornia")
pytest.importorskip("PIL")

from PIL import Image

from robustkern import data
from robustkern.data import BatchAugmentation, DataError, Mixing
from robustkern.sharding import Shard
from robustkern.training import UsageError, recipe, train
from robustkern.training.batches import epoch_batches
from robustkern.training.feed import Feed

pytestmark = pytest.mark.usefixtures("no_figures")
GREY, COLOUR = torch.rand(24, 1, 12, 10), torch.rand(24, 3, 12, 10)
AUGMENTATIONS = [
    BatchAugmentation(randaugment=2), BatchAugmentation(colour=0.4), BatchAugmentation(erasing=0.5),
    BatchAugmentation(randaugment=1, magnitude=10, colour=0.2, erasing=1.0),
]  # fmt: skip


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_a_sample_is_augmented_alike_in_any_batch(augmentation, images):
    samples, before = torch.randperm(1000)[: len(images)], images.clone()
    whole = augmentation(images, samples, seed=3, epoch=1)
    assert whole.shape == images.shape and 0 <= whole.min() <= whole.max() <= 1
    assert torch.equal(images, before)
    moved = (whole != images).flatten(1).any(1)
    assert moved.float().mean() > 0.3
    for rows in (slice(0, 1), slice(5, 12), [3, 20]):
        torch.testing.assert_close(augmentation(images[rows], samples[rows], seed=3, epoch=1), whole[rows])
    assert not torch.equal(augmentation(images, samples, seed=3, epoch=2), whole)
    assert not torch.equal(augmentation(images, samples, seed=4, epoch=1), whole)


def test_randaugment_uses_all_operations_and_turns_by_what_it_says():
    squares = torch.zeros(300, 1, 9, 9)
    squares[:, :, 2:5, 2:7] = 0.7
    found = BatchAugmentation(randaugment=1, magnitude=10)(squares, torch.arange(300), seed=0, epoch=0)
    assert len({tuple(image.flatten().mul(1e4).round().tolist()) for image in found}) >= 15  # 8 of the 12 have a sign
    unchanged = BatchAugmentation(randaugment=1, magnitude=0)(squares, torch.arange(300), seed=0, epoch=0)
    # Without strength only the two that have none do anything: the stretched range, and the equal histogram.
    assert {round(float(image.max()), 3) for image in unchanged} == {0.7, 1.0}


def test_erasing_has_the_probability_and_the_areas_that_it_says():
    ones = torch.ones(400, 1, 40, 40)
    erased = BatchAugmentation(erasing=0.4)(ones, torch.arange(400), seed=0, epoch=0)
    areas = (erased == 0.5).float().mean((1, 2, 3))
    assert 0.33 < (areas > 0).float().mean() < 0.47
    assert areas[areas > 0].min() > 0.015 and areas.max() < 0.36
    for image in erased[areas > 0][:20, 0]:
        rows, columns = (image == 0.5).any(1), (image == 0.5).any(0)
        assert (image == 0.5).sum() == rows.sum() * columns.sum()  # a rectangle


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0), Mixing(0.4, 1.0)], ids=str)
def test_pairs_are_mixed_alike_by_any_number_of_processes(mixing):
    x, y = torch.rand(11, 1, 8, 6), torch.arange(11) % 3
    whole, labels = mixing(x, y, 3, offset=0, seed=1, step=7)
    torch.testing.assert_close(labels.sum(1), torch.ones(11))
    assert torch.equal(whole[10], x[10]) and torch.equal(labels[10], torch.eye(3)[1])
    for pair in range(5):
        a, b = 2 * pair, 2 * pair + 1
        torch.testing.assert_close(whole[a] + whole[b], x[a] + x[b])
        kept = labels[a, y[a]]
        torch.testing.assert_close(labels[a], kept * torch.eye(3)[y[a]] + (1 - kept) * torch.eye(3)[y[b]])
        difference = (whole[a] - x[b]).abs().sum() / (x[a] - x[b]).abs().sum()
        assert abs(difference - kept) < (1e-4 if mixing.cutmix == 0 else 0.25)
    for processes in (2, 3, 4):
        for rank in range(processes):
            shard = Shard.of(rank, processes, 11)
            begin, end = mixing.with_partners(shard.offset, shard.size, 11)
            part, soft = mixing(x[begin:end], y[begin:end], 3, offset=begin, seed=1, step=7)
            own = slice(shard.offset - begin, shard.offset - begin + shard.size)
            assert torch.equal(part[own], shard.rows(whole)) and torch.equal(soft[own], shard.rows(labels))
    assert not torch.equal(mixing(x, y, 3, offset=0, seed=1, step=8)[0], whole)


def test_extra_samples_have_their_share_and_go_round_in_their_own_order():
    config = recipe("digits", extra=".", extra_share=0.75, batch_size=16)
    seen = []
    for epoch in range(3):
        parts = epoch_batches(config, 30, 100, epoch)
        assert [len(part) for part in parts] == [16] * 7 + [8]  # 4 of 30 samples each, and 12 extra ones
        whole = torch.cat(parts)
        assert sorted(whole[whole < 30].tolist()) == list(range(30))
        seen += (whole[whole >= 30] - 30).tolist()
    assert len(seen) == 3 * 90
    assert sorted(seen[:100]) == sorted(seen[100:200]) == list(range(100)) and seen[:100] != seen[100:200]
    plain = recipe("digits", batch_size=16)
    order = data.epoch_order(0, 2, 30)
    assert all(torch.equal(a, b) for a, b in zip(epoch_batches(plain, 30, 0, 2), order.split(16), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits 0 and 1 as files, and others as extra ones."""
    roots = []
    digits = data.load("digits")
    for name, begin in (("real", 0), ("made", 20)):
        root = tmp_path_factory.mktemp(name)
        for split in ("train", "test"):
            for label in range(2):
                folder = root / split / str(label)
                folder.mkdir(parents=True)
                for number, image in enumerate(digits.images[digits.labels == label][begin : begin + 20]):
                    Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{number}.png")
        roots.append(str(root))
    return roots


def test_a_batch_is_the_same_for_any_number_of_processes(folders):
    config = recipe(folders[0], image_size=10, extra=folders[1], extra_share=0.5, batch_size=9, mixup=0.3, colour=0.2)
    view = config.view
    pool = data.join(data.stream(folders[0], view), data.stream(folders[1], view))
    whole = Feed(config, pool, 40)
    parts = whole.epoch(1, 0, 1, first=2)
    expected = {step: whole.batch(parts[step], Shard.of(0, 1, len(parts[step])), 1, step) for step in (2, 3)}
    assert expected[2][0].shape == (9, 1, 10, 10) and expected[2][1].shape == (9, 2)
    for rank in range(2):
        feed = Feed(config, pool, 40)
        assert all(torch.equal(a, b) for a, b in zip(feed.epoch(1, rank, 2, first=2), parts, strict=True))
        for step in (2, 3):
            shard = Shard.of(rank, 2, len(parts[step]))
            for found, all_rows in zip(feed.batch(parts[step], shard, 1, step), expected[step], strict=True):
                torch.testing.assert_close(found, shard.rows(all_rows))
        feed.close()


@pytest.mark.parametrize("given", [{}, {"image_size": 12}], ids=["in memory", "streamed"])
def test_a_run_with_everything_is_resumed_to_the_same_bits(folders, tmp_path, given):
    config = recipe(
        folders[0], "gradient-penalty", **given, extra=folders[1], extra_share=0.5, batch_size=16, epochs=2,
        randaugment=1, colour=0.2, erasing=0.5, mixup=0.2, cutmix=1.0, eval_samples=10, pgd_steps=1, threads=1,
    )  # fmt: skip
    train(config, tmp_path / "whole")

    class Crash(BaseException):
        pass

    from robustkern.training import Observer

    class Crashing(Observer):
        def on_epoch(self, row):
            raise Crash

    with pytest.raises(Crash):
        train(config, tmp_path / "killed", observer=Crashing())
    train(config, tmp_path / "killed", resume=True, workers=1)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def test_what_does_not_fit_together(folders, tmp_path):
    quick = {"epochs": 1, "eval_samples": 5, "pgd_steps": 1, "threads": 1}
    with pytest.raises(UsageError, match="mixup and cutmix mix labels, which method mart cannot take"):
        train(recipe("digits", "mart", mixup=0.2, **quick), tmp_path / "a")
    with pytest.raises(DataError, match=r"images \[1, 8, 8\] of 2 classes beside those of digits, \[1, 8, 8\] of 10"):
        train(recipe("digits", extra=folders[0], **quick), tmp_path / "b")
    with pytest.raises(UsageError, match=r"extra_share 0.1 of batch_size 4 leaves no sample on one side"):
        recipe("digits", extra=folders[0], extra_share=0.1, batch_size=4)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert np.isclose(recipe("digits").extra_share, 0.7)
