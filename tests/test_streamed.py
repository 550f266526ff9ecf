"""Image folders that are read while they are used: images of any sizes, the same bits whoever reads them."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from PIL import Image
from typer.testing import CliRunner

from robustkern import data, training
from robustkern.cli.app import app
from robustkern.data import DataError, DataWarning, Reader, View
from robustkern.data import index as index_module
from robustkern.data import kept as kept_module
from robustkern.data.decode import decode
from robustkern.sharding import Shard
from robustkern.training import Observer, UsageError, recipe, train

pytestmark = pytest.mark.usefixtures("no_figures")


def write_digits(root, counts, kinds=("jpg", "png")):
    """The digits 0, 1 and 2 as images of many sizes."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        digits = data.load("digits", split=split)
        for label in range(3):
            folder = root / split / f"digit {label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(digits.images[digits.labels == label][:count]):
                size = tuple(int(side) for side in random.integers(8, 40, 2))
                pixels = Image.fromarray((image[0] * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
                pixels.save(folder / f"{number}.{kinds[number % len(kinds)]}")
    for folder in (root, *root.rglob("*")):
        if folder.is_dir():
            os.utime(folder, (1e9, 1e9))  # long settled


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, {"train": 30, "test": 8})
    return root


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "digits"
    write_digits(root, {"train": 3, "test": 1})
    return root


# ------------------------------------------------------------------ index


def test_the_index_names_every_image_and_is_made_once(folder, monkeypatch):
    made = index_module.folder_index(folder, "train")
    assert made.classes == ("digit 0", "digit 1", "digit 2") and made.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [made.path(number) for number in range(9)] == sorted((folder / "train").rglob("*.*"))
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_scan", lambda *_, **__: pytest.fail("scanned again"))
        again = index_module.folder_index(folder, "train")
    assert [again.path(number) for number in range(9)] == [made.path(number) for number in range(9)]

    (folder / "train/digit 1/0.jpg").rename(folder / "train/digit 1/a name of ünusual length.jpg")
    changed = index_module.folder_index(folder, "train")
    assert changed.path(5).name == "a name of ünusual length.jpg" and len(changed) == 9
    # The folder has only just changed: the next change might leave its time as it is, so nothing was kept.
    monkeypatch.setattr(index_module, "_SETTLED", 0)
    os.utime(folder / "train/digit 1", (1e9 + 1, 1e9 + 1))
    index_module.folder_index(folder, "train")
    stored = folder / ".robustkern-index-train.npz"
    content = bytearray(stored.read_bytes())
    place = content.index(b"a name of")
    content[place] ^= 1
    stored.write_bytes(content)
    assert index_module.folder_index(folder, "train").path(5).name == "a name of ünusual length.jpg"


def test_a_class_that_train_alone_gains_moves_the_labels_of_the_kept_index(folder):
    shutil.rmtree(folder / "test/digit 0")
    os.utime(folder / "test", (1e9, 1e9))
    assert index_module.folder_index(folder, "test").labels.tolist() == [1, 2]
    shutil.copytree(folder / "train/digit 0", folder / "train/another")
    assert index_module.folder_index(folder, "test").labels.tolist() == [2, 3]


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    create = kept_module.tempfile.mkstemp

    def refused(dir, **given):  # the tests may run as root, who can write everywhere
        if dir == folder:
            raise PermissionError("read-only")
        return create(dir=dir, **given)

    monkeypatch.setattr(kept_module.tempfile, "mkstemp", refused)
    index_module.folder_index(folder, "train")
    assert not (folder / ".robustkern-index-train.npz").exists()
    assert len(list((tmp_path / "cache/robustkern").glob("*-index-train.npz"))) == 1
    monkeypatch.setattr(index_module, "_scan", lambda *_, **__: pytest.fail("scanned again"))
    assert len(index_module.folder_index(folder, "train")) == 9


def test_what_is_no_image_is_told_and_a_class_without_one_refused(folder):
    (folder / "train/digit 0/notes.txt").write_text("")
    (folder / "train/digit 0/more").mkdir()
    with pytest.warns(DataWarning, match="skipped 2 that are no image"):
        index_module.folder_index(folder, "train")
    (folder / "train/empty").mkdir()
    with pytest.raises(DataError, match="empty: a class without an image"):
        index_module.folder_index(folder, "train")
    (folder / "test/stranger").mkdir()
    with pytest.raises(DataError, match="class stranger does not occur"):
        index_module.folder_index(folder, "test")


# ------------------------------------------------------------------ decoding

RAMP = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8) * 5


def test_an_image_of_the_right_size_keeps_its_pixels():
    square = Image.fromarray(RAMP[:, 1:7])
    assert (decode(square, "ramp", 1, 6, View(6, center=1.0).middle(6, 6), False)[0] == RAMP[:, 1:7]).all()
    assert (decode(square, "ramp", 3, 6, (0, 0, 6, 6), True) == RAMP[None, :, 6:0:-1]).all()
    assert (decode(Image.fromarray(RAMP), "ramp", 1, 4, (3, 1, 7, 5), False)[0] == RAMP[1:5, 3:7]).all()


def test_the_orientation_of_a_photograph_is_applied_before_it_is_cropped(tmp_path):
    image, exif = Image.fromarray(RAMP), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        found = decode(turned, "turned", 1, 4, (1, 3, 5, 7), False)
    assert (found[0] == np.rot90(RAMP, -1)[3:7, 1:5]).all()


def test_crops_of_a_large_jpeg_are_decoded_small_and_close_to_those_decoded_whole(tmp_path):
    y, x = np.mgrid[0:640, 0:960]
    pixels = (127 + 60 * np.sin(x / 90)[..., None] * [1, 0.5, 0.2] + 50 * np.cos(y / 70)[..., None]).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    box = (100.0, 50.0, 900.0, 600.0)
    with Image.open(tmp_path / "large.jpg") as image:
        small = decode(image, "large", 3, 64, box, False)
        assert image.size == (120, 80)  # an eighth: 800 x 550 pixels become at least 64 x 64
    with Image.open(tmp_path / "large.jpg") as image:
        image.load()
        whole = decode(image, "large", 3, 64, box, False)
    assert abs(small.astype(int) - whole).max() <= 6


def test_random_crops_are_inside_have_the_asked_sizes_and_are_drawn_per_sample():
    view, boxes, mirrored = View(32, crop_scale=0.25), set(), 0
    for epoch in range(2):
        for sample in range(200):
            (left, upper, right, lower), flipped = view.draw(60, 40, 7, epoch, sample)
            assert 0 <= left < right <= 60 and 0 <= upper < lower <= 40
            assert 0.24 * 2400 < (right - left) * (lower - upper) <= 2400
            assert 0.7 < (right - left) / (lower - upper) < 1.4
            boxes.add((left, upper, right, lower))
            mirrored += flipped
    assert len(boxes) > 360 and 160 < mirrored < 240
    assert view.draw(60, 40, 7, 1, 5) == view.draw(60, 40, 7, 1, 5) != view.draw(60, 40, 8, 1, 5)
    assert view.draw(400, 10, 0, 0, 0)[0] == (193, 0, 206, 10)  # no crop of these shapes fits into a strip


# ------------------------------------------------------------------ reading


def test_whoever_reads_reads_the_same_bits(shared):
    whole = data.stream(str(shared), View(12))
    assert whole.in_shape == (1, 12, 12) and len(whole) == 90 and set(whole.labels.tolist()) == {0, 1, 2}
    order = data.epoch_order(3, 1, 90)
    with Reader(whole, seed=3) as reader:
        expected = list(reader.read(order.split(32), epoch=1))
        other = list(reader.read(order.split(32), epoch=2))
    assert [len(part) for part in expected] == [32, 32, 26] and not torch.equal(expected[0], other[0])
    with Reader(dataclasses.replace(whole, workers=2), seed=3) as reader:
        for epoch in (0, 1):  # its processes outlive an epoch
            found = list(reader.read(order.split(32), epoch=epoch))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Two processes with half of each batch each, and a resumed epoch.
    for rank in range(2):
        shards = [Shard.of(rank, 2, len(part)) for part in order.split(32)]
        with Reader(whole, seed=3) as reader:
            mine = [shard.rows(part) for shard, part in zip(shards, order.split(32))][1:]
            for shard, part, all_rows in zip(shards[1:], reader.read(mine, epoch=1), expected[1:]):
                assert torch.equal(part, shard.rows(all_rows))
    # Samples held out for validation do not move the others.
    few = whole.take(torch.arange(1, 90, 2))
    with Reader(few, seed=3) as reader:
        (found,) = reader.read([torch.tensor([0, 4])], epoch=1)
    with Reader(whole, seed=3) as reader:
        (same,) = reader.read([torch.tensor([1, 9])], epoch=1)
    assert torch.equal(found, same)


def test_statistics_are_those_of_the_first_images(shared):
    streamed = data.stream(str(shared), View(12))
    images = streamed.in_memory()
    assert images.labels.equal(streamed.labels) and images.images.shape == (90, 1, 12, 12)
    mean, std = streamed.statistics()
    assert mean == pytest.approx([images.images.mean().item()]) and std[0] > 0.1


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_one_sentence_from_any_process(folder, workers):
    (folder / "train/digit 1/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"digit 1/1.png: not a readable image") as error:
        data.stream(str(folder), View(8), channels=1, workers=workers).in_memory()
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_colour_among_grey_is_refused_and_grey_among_colour_becomes_colour(folder):
    red = np.zeros((9, 9, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    Image.fromarray(red).save(folder / "train/digit 2/red.png")
    assert data.stream(str(folder), View(8)).in_shape == (3, 8, 8)
    assert data.stream(str(folder), View(8)).in_memory().images.shape[1:] == (3, 8, 8)
    with pytest.raises(DataError, match=r"red.png: in colour, but the images looked at first are grey"):
        data.stream(str(folder), View(8), channels=1).in_memory()


def test_val_may_stand_for_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(data.stream(str(folder), View(8), split="test")) == 3
    with pytest.raises(DataError, match="no data set 'nowhere'"):
        data.stream("nowhere", View(8))
    with pytest.raises(UsageError, match="crop_scale takes an image_size"):
        recipe("digits", crop_scale=0.5)


# ------------------------------------------------------------------ runs

QUICK = {"image_size": 12, "epochs": 2, "batch_size": 16, "eval_samples": 10, "pgd_steps": 1, "threads": 1,
         "validation": 0.2, "checkpoint_every": 2, "eps": 0.1}  # fmt: skip


class Crash(BaseException):
    """A power failure."""


class CrashAt(Observer):
    def __init__(self, step):
        self.step = step

    def on_step(self, progress):
        if progress.step == self.step:
            raise Crash


def test_a_run_that_is_killed_ends_with_the_same_bits_with_other_workers(shared, tmp_path):
    config = recipe(str(shared), "gradient-penalty", **QUICK)
    train(config, tmp_path / "whole", workers=0)
    for step, workers in ((3, 2), (5, 0), (8, 1)):
        with pytest.raises(Crash):
            train(config, tmp_path / "killed", workers=workers, resume=True, observer=CrashAt(step))
    train(config, tmp_path / "killed", workers=2, resume=True)
    for name in ("model", "best"):
        files = [tmp_path / run / f"{name}.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_is_evaluated_at_its_size(shared, tmp_path):
    words = ["train", "--data", str(shared), "--image-size", "12", "--epochs", "1", "--pgd-steps", "1", "--eval-crop",
             "1", "--out", str(tmp_path / "run"), "--workers", "0", "--threads", "1"]  # fmt: skip
    output = CliRunner().invoke(app, words)
    assert output.exit_code == 0, output.output
    assert training.read_config(tmp_path / "run").view == View(12, center=1.0)
    words = ["evaluate", str(tmp_path / "run"), "--attacks", "pgd", "--pgd-steps", "1", "--samples", "24", "--restarts",
             "1", "--check-samples", "4"]  # fmt: skip
    output = CliRunner().invoke(app, words)
    assert output.exit_code == 0, output.output
    found = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())["clean"]["accuracy"]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert found == pytest.approx(results["weights"]["last"]["clean_accuracy"])


# ------------------------------------------------------------------ arrays, shards, named sets


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "colour"])
def test_arrays_are_mapped_and_read(tmp_path, layout):
    digits = data.load("digits-28").first(40)
    pixels = (digits.images[:, 0] * 255).round().byte().numpy()
    shaped = {"NHW": pixels, "NHWC": pixels[..., None], "NCHW": pixels[:, None]}
    for split, part in (("train", slice(0, 30)), ("val", slice(30, 33))):
        (tmp_path / split).mkdir()
        stored = shaped.get(layout, np.repeat(pixels[..., None], 3, 3))[part]
        np.save(tmp_path / split / "images.npy", stored)
        np.save(tmp_path / split / "labels.npy", digits.labels[part].numpy().astype(np.uint8))
    (tmp_path / "classes.txt").write_text("".join(f"digit {number}\n" for number in range(10)))
    train_set = data.stream(str(tmp_path), View(28, center=1.0))
    found = train_set.in_memory()
    assert found.classes == tuple(f"digit {number}" for number in range(10))
    channels = 3 if layout == "colour" else 1
    expected = torch.from_numpy(pixels[train_set.rows]).float()[:, None].div(255).expand(-1, channels, -1, -1)
    assert torch.equal(found.images, expected) and torch.equal(found.labels, digits.labels[train_set.rows])
    test_set = data.stream(str(tmp_path), View(28), split="test", channels=channels)
    assert len(test_set) == 3 and test_set.classes == found.classes


def test_arrays_that_are_none(tmp_path):
    (tmp_path / "train").mkdir()
    for images, labels, message in (
        (np.zeros((4, 8, 8), np.float32), np.arange(4), "must be uint8"),
        (np.zeros((4, 8, 8, 5), np.uint8), np.arange(4), r"must be uint8 .* got uint8 \[4, 8, 8, 5\]"),
        (np.zeros((4, 8, 8), np.uint8), np.arange(3), "must be 4 integers from 0 on, got int64"),
        (np.zeros((4, 8, 8), np.uint8), np.arange(4) - 1, "must be 4 integers from 0 on"),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4, int), "a label 0 among 1 classes"),
        (np.array([print] * 4), np.arange(4), "not an array that can be read"),
    ):
        np.save(tmp_path / "train/images.npy", images, allow_pickle=True)
        np.save(tmp_path / "train/labels.npy", labels)
        with pytest.raises(DataError, match=message):
            data.stream(str(tmp_path), View(8))


def test_shards_of_webdataset_are_read_by_place(shared, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    files = data.stream(str(shared), View(12))
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/train/%04d.tar", maxcount=40, verbose=0) as writer:
        for number, label in enumerate(files.source.index.labels.tolist()):
            path = files.source.name(number)
            writer.write({"__key__": f"n{number:03d}", path.suffix[1:]: path.read_bytes(), "cls": label})
    shards = data.stream(str(tmp_path), View(12))
    assert [path.name for path in shards.source.files] == ["0000.tar", "0001.tar", "0002.tar"]
    assert shards.classes == ("0", "1", "2") and torch.equal(shards.labels, files.labels)
    order = data.epoch_order(0, 0, 90).split(45)
    with Reader(files, seed=1) as one, Reader(dataclasses.replace(shards, workers=1), seed=1) as other:
        for a, b in zip(one.read(order, epoch=3), other.read(order, epoch=3), strict=True):
            assert torch.equal(a, b)
    again = data.stream(str(tmp_path), View(12))  # from the stored index
    assert np.array_equal(again.source.begin, shards.source.begin)
    with webdataset.TarWriter(f"{tmp_path}/test/0.tar") as writer:
        writer.write({"__key__": "a", "cls": 1})
    with pytest.raises(DataError, match=r"0.tar: sample a has no image, or no .cls"):
        data.stream(str(tmp_path), View(12), split="test")
    (tmp_path / "test/0.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match="not a tar file that can be read"):
        data.stream(str(tmp_path), View(12), split="test")


def test_a_named_set_at_another_size():
    small = data.load("digits-28").first(20)
    streamed = data.stream("digits-28", View(56, center=1.0))
    assert streamed.in_shape == (1, 56, 56) and len(streamed) == 1442
    assert torch.equal(streamed.labels, data.load("digits-28").labels[streamed.rows])
    same = data.stream("digits-28", View(28, center=1.0))
    place = int((same.rows == 7).nonzero())
    assert (same.take(torch.tensor([place])).in_memory().images - small.images[7]).abs().max() <= 0.5001 / 255
