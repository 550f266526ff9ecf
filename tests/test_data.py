"""Data sets: what is read is right, what is damaged or dangerous is refused in one sentence."""

import gzip
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from robustkern import data
from robustkern.data import CropFlip, DataError, epoch_order, generator


def idx(array: np.ndarray, type_code: int = 8) -> bytes:
    return bytes((0, 0, type_code, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, *, compress=True, train=12, test=5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    written = {}
    for stem, count in (("train", train), ("t10k", test)):
        arrays = {
            f"{stem}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{stem}-labels-idx1-ubyte": rng.integers(0, 10, count, dtype=np.uint8),
        }
        for name, array in arrays.items():
            content = idx(array)
            path = folder / (name + (".gz" if compress else ""))
            path.write_bytes(gzip.compress(content) if compress else content)
        written.update(arrays)
    return written


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_idx_files_are_read(tmp_path, compress, subfolder):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    written = write_mnist(folder, compress=compress)
    train = data.load("mnist", tmp_path, "train")
    assert train.images.shape == (12, 1, 28, 28) and train.images.dtype == torch.float32
    assert torch.equal((train.images * 255).round().byte()[:, 0], torch.from_numpy(written["train-images-idx3-ubyte"]))
    assert train.labels.tolist() == written["train-labels-idx1-ubyte"].tolist()
    assert train.num_classes == 10 and len(data.load("mnist", tmp_path, "test")) == 5


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[:-3], "truncated"),
        (lambda content: content + b"\0", "truncated or corrupt"),
        (lambda content: b"\x00\x00\x0d\x03" + content[4:], "not an IDX file"),
        (lambda content: content[:7], "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
    ],
    ids=["truncated", "too long", "wrong magic", "cut header", "empty"],
)
def test_damaged_idx_files_are_refused(tmp_path, damage, message):
    write_mnist(tmp_path, compress=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        data.load("mnist", tmp_path, "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_gzip_is_refused(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="truncated"):
        data.load("mnist", tmp_path, "train")


def test_images_and_labels_must_belong_together(tmp_path):
    write_mnist(tmp_path, compress=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, dtype=np.uint8)))
    with pytest.raises(DataError, match="12 images but .* 3 labels"):
        data.load("mnist", tmp_path, "train")


def test_labels_outside_the_classes_are_refused(tmp_path):
    write_mnist(tmp_path, compress=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(12, 10, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"labels outside 0\.\.9"):
        data.load("mnist", tmp_path, "train")


@pytest.mark.parametrize("name, command", [("mnist", "--root"), ("cifar10", "wget https://")])
def test_a_missing_data_set_names_the_way_to_get_it(tmp_path, name, command):
    with pytest.raises(DataError, match=command):
        data.load(name, tmp_path)


def test_fashion_mnist_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_DEBIAN", tmp_path)
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist")


def test_unknown_names_and_roots(tmp_path):
    with pytest.raises(DataError, match="no data set 'imagenet'.*digits.*fashion-mnist"):
        data.load("imagenet")
    with pytest.raises(DataError, match="no such folder"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split"):
        data.load("mnist", tmp_path, "valid")


def test_digits_split_is_fixed_and_stratified():
    pytest.importorskip("sklearn")
    train, test = data.load("digits"), data.load("digits", split="test")
    assert (len(train), len(test)) == (1442, 355)
    assert train.in_shape == (1, 8, 8) and train.num_classes == 10
    assert train.images.min() == 0 and train.images.max() == 1
    counts = torch.bincount(test.labels)
    assert counts.min() >= 34 and counts.max() <= 37
    # No image is in both splits; every fifth of its class is a test image.
    seen = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in seen for image in test.images) == 0
    mean, std = train.statistics()
    assert mean[0] == pytest.approx(float(train.images.mean()), rel=1e-5) and 0.3 < std[0] < 0.45


def test_enlarged_digits_are_the_digits():
    pytest.importorskip("sklearn")
    small, large = data.load("digits", split="test"), data.load("digits-28", split="test")
    assert large.in_shape == (1, 28, 28)
    assert torch.equal(small.labels, large.labels)
    assert large.images.min() >= 0
    assert large.images.max() <= 1
    back = torch.nn.functional.adaptive_avg_pool2d(large.images, 8)
    assert (back - small.images).abs().mean() < 0.1


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def cifar_batch(count: int, seed: int, protocol: int = 2) -> tuple[bytes, np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, count).tolist()
    stored = np.asfortranarray(pixels) if seed % 2 else pixels  # pickled column by column
    content = {b"batch_label": b"batch", b"labels": labels, b"data": stored, b"filenames": [b"x.png"] * count}
    return pickle.dumps(content, protocol=protocol), pixels, labels


def write_cifar(folder, count=4) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = []
    for number in range(1, 6):
        content, batch, _ = cifar_batch(count, number)
        (folder / f"data_batch_{number}").write_bytes(content)
        pixels.append(batch)
    (folder / "test_batch").write_bytes(cifar_batch(count, 9)[0])
    return np.concatenate(pixels)


def test_cifar_pickles_are_read(tmp_path):
    pixels = write_cifar(tmp_path / "cifar-10-batches-py")
    train = data.load("cifar10", tmp_path)
    assert train.images.shape == (20, 3, 32, 32) and train.classes[3] == "cat"
    assert torch.equal((train.images * 255).round().byte().flatten(1), torch.from_numpy(pixels))
    assert len(data.load("cifar10", tmp_path, "test")) == 4


def test_cifar_archive_is_read_without_being_unpacked(tmp_path):
    pixels = write_cifar(tmp_path / "source" / "cifar-10-batches-py")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    train = data.load("cifar10", root)
    assert torch.equal((train.images * 255).round().byte().flatten(1), torch.from_numpy(pixels))
    assert os.listdir(root) == ["cifar-10-python.tar.gz"]


def test_truncated_cifar_archive_is_refused(tmp_path):
    write_cifar(tmp_path / "source")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source", "cifar-10-batches-py")
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="truncated"):
        data.load("cifar10", tmp_path)


def test_cifar_binary_version_is_read(tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 10, (3, 3073), dtype=np.uint8)
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes()[:-1])
    train = data.load("cifar10", tmp_path)
    assert train.labels.tolist() == records[:, 0].tolist() * 5
    assert (train.images[1] * 255).round().byte().flatten().tolist() == records[1, 1:].tolist()
    with pytest.raises(DataError, match="whole records"):
        data.load("cifar10", tmp_path, "test")


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    write_cifar(tmp_path)
    bomb = tmp_path / "exploded"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": _Bomb(str(bomb)), b"labels": []}, protocol=2))
    with pytest.raises(DataError, match=r"cannot be read safely|read safely .*mkdir"):
        data.load("cifar10", tmp_path)
    assert not bomb.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": np.array([object()]), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.ones((2, 3072)), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.ones((2, 5), dtype=np.uint8), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.ones((2, 3072), dtype=np.uint8), b"labels": [1]}, protocol=2),
        pickle.dumps({b"labels": [1]}, protocol=2),
        pickle.dumps([1, 2, 3]),
        cifar_batch(4, 0)[0][:-200],
        b"",
        # A call of numpy.ndarray itself, with a shape that would fill the memory.
        b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86R.",
    ],
    ids=["objects", "floats", "shape", "labels", "no data", "list", "truncated", "empty", "memory"],
)
def test_pickles_that_are_not_a_batch_are_refused(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match="not a CIFAR-10 batch") as caught:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_batch_is_named(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4: missing"):
        data.load("cifar10", tmp_path)


# --- image folders ----------------------------------------------------------------------------------------------------


def write_folder(root, mode="RGB", size=(9, 7)):
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                image_module.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_image_folders_are_read(tmp_path, mode, channels):
    train = data.load(str(write_folder(tmp_path, mode)))
    assert train.images.shape == (6, channels, 7, 9) and train.classes == ("cat", "dog")
    assert train.labels.bincount().tolist() == [3, 3]
    assert train.images.min() >= 0 and train.images.max() <= 1


def test_the_first_images_of_a_folder_are_of_all_its_classes(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for label in range(5):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        for number in range(40):
            shade = np.full((2, 2), 40 * label + number, np.uint8)
            image_module.fromarray(shade).save(tmp_path / "train" / str(label) / f"{number:02}.png")
    whole = data.load(str(tmp_path))
    assert whole.first(60).labels.bincount(minlength=5).min() >= 5
    shades = (255 * whole.images[:, 0, 0, 0]).round().long()
    assert torch.equal(shades // 40, whole.labels) and shades.sort().values.tolist() == list(range(200))
    again = data.load(str(tmp_path))
    assert torch.equal(again.images, whole.images) and torch.equal(again.labels, whole.labels)


def test_image_folder_errors(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(DataError, match="1.png: not a readable"):
        data.load(str(root))
    (root / "test" / "bird").mkdir()
    with pytest.raises(DataError, match="class bird does not occur"):
        data.load(str(root), split="test")
    with pytest.raises(DataError, match="train/ and test/"):
        data.load(str(root / "train"), split="test")


# --- order and augmentation -------------------------------------------------------------------------------------------


def test_epoch_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    first = epoch_order(3, 5, 100)
    torch.rand(7)
    assert torch.equal(first, epoch_order(3, 5, 100))
    assert first.sort().values.tolist() == list(range(100))
    others = [epoch_order(3, 6, 100), epoch_order(4, 5, 100), epoch_order(5, 3, 100)]
    assert not any(torch.equal(first, other) for other in others)


def test_streams_are_unrelated_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    draws = torch.stack([torch.rand(4000, generator=generator(s, "x", c)) for s in range(4) for c in range(4)])
    assert torch.equal(before, torch.get_rng_state())
    correlation = torch.corrcoef(draws) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4000**0.5
    assert generator(-1, "x").initial_seed() != generator(1, "x").initial_seed()


def test_augmentation_depends_on_the_sample_not_on_its_batch():
    images = torch.rand(10, 3, 32, 32)
    augment = CropFlip()
    whole = augment(images, torch.arange(10), seed=1, epoch=2, count=10)
    part = augment(images[[7, 3]], torch.tensor([7, 3]), seed=1, epoch=2, count=10)
    assert torch.equal(part, whole[[7, 3]])
    assert not torch.equal(whole, augment(images, torch.arange(10), seed=1, epoch=3, count=10))
    assert whole.shape == images.shape


def test_augmentation_is_crop_and_flip():
    image = torch.arange(1.0, 37).view(1, 1, 6, 6)
    count = 400
    out = CropFlip(padding=1)(image.expand(count, -1, -1, -1), torch.arange(count), seed=0, epoch=0, count=count)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    crops = [padded[0, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    allowed = {crop.numpy().tobytes() for crop in crops} | {
        crop.flip(-1).contiguous().numpy().tobytes() for crop in crops
    }
    assert {picture.numpy().tobytes() for picture in out} == allowed


def test_dataset_checks_itself():
    with pytest.raises(DataError, match="float32"):
        data.Dataset("x", torch.zeros(2, 1, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), ("a", "b"))
    assert data.augmentation("digits") is None and isinstance(data.augmentation("cifar10"), CropFlip)
