"""CIFAR-10 from the files of its published archives: the Python version (pickles) and the binary version.

Pickles run code when they are read. The Python version is therefore read with an unpickler that knows how to rebuild a
NumPy array of bytes and nothing else.
"""

import gzip
import io
import pickle
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robustkern._files import read_bytes
from robustkern._pickles import check_pickle
from robustkern._text import brief

from .dataset import DataError, Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_STEMS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 64 << 20  # a batch file is 31 MB; anything larger is not one
_MOST_UNPACKED = 512 << 20  # of an archive; the published ones unpack to 185 MB
_MOST_MEMBERS = 10_000  # of an archive; the published ones have eight
_MOST_INSTRUCTIONS = 200_000  # of a pickle; the published ones have a third


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds containers, strings, numbers and NumPy arrays of bytes; refuses every other global."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _Global(self._latin1)
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it wants to import {module}.{name}")
        return _GLOBALS[module, name]

    def _latin1(self, text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes in protocol 2. Any other codec could do work of its own.
        if encoding != "latin1":
            raise pickle.UnpicklingError("another codec than latin1")
        self._left -= len(text)
        if self._left < 0:  # one text, encoded again and again
            raise pickle.UnpicklingError("it makes more bytes than it has")
        return text.encode("latin1")


class _Global(partial[Any]):
    """A stand-in for a global of the file: it can only be called; not even its state can be set."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it wants to change a function")


class _Array:
    """An array of bytes, as NumPy pickles one: made empty, then filled by the BUILD instruction."""

    pixels: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        if not isinstance(dtype, _Uint8) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of other things than bytes")
        self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order="F" if columns_first else "C")


class _Uint8:
    """The only dtype of the arrays in the published files."""

    def __setstate__(self, state: object) -> None:
        pass


def _dtype(code: str | bytes, *flags: object) -> _Uint8:
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError("an array of another type than bytes")
    return _Uint8()


def _no_call(*arguments: object) -> None:
    raise pickle.UnpicklingError("it wants to call numpy.ndarray")


_RECONSTRUCT = _Global(lambda kind, shape, typecode: _Array())
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # of NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): _Global(_no_call),
    ("numpy", "dtype"): _Global(_dtype),
}


def read_batch(content: bytes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] and labels [N], uint8, of one batch file of either version.

    Args:
        content: The whole file.
        label: Its name in errors.
    """
    if label.endswith(".bin"):
        if not content or len(content) % (1 + _PIXELS):
            raise DataError(
                f"{label}: {len(content)} bytes are not whole records of {1 + _PIXELS}: truncated or corrupt"
            )
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _PIXELS)
        return records[:, 1:], records[:, 0]
    try:
        check_pickle(content, _MOST_INSTRUCTIONS)
        batch = _ArrayUnpickler(content).load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        array, labels = batch["data"], batch["labels"]
    # A pickle is a program: a damaged one can fail with nearly any exception.
    except Exception as error:
        reason = brief(error) or type(error).__name__
        raise DataError(f"{label}: not a CIFAR-10 batch that can be read safely ({reason})") from error
    pixels = array.pixels if isinstance(array, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        shape = type(array).__name__ if pixels is None else list(pixels.shape)
        raise DataError(f"{label}: not a CIFAR-10 batch: data must be bytes [N, {_PIXELS}], got {shape}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{label}: not a CIFAR-10 batch: {len(pixels)} images without a list of as many labels")
    for value in labels:
        if type(value) is not int or not 0 <= value < len(CLASSES):
            # Not the content of a container: its text may be larger than the file by any factor.
            got = brief(value) if isinstance(value, (int, float)) else f"a {type(value).__name__}"
            raise DataError(f"{label}: not a CIFAR-10 batch: a label must be 0 to {len(CLASSES) - 1}, got {got}")
    return pixels, np.array(labels, dtype=np.uint8)


def load_cifar10(folders: list[Path], split: str) -> Dataset | None:
    """CIFAR-10 from the first folder that holds it, unpacked or as its archive; None if none does."""
    for folder in folders:
        for contents in (_from_files(folder, split), _from_archive(folder, split)):
            if contents is not None:
                return _assemble(contents)
    return None


def _from_files(folder: Path, split: str) -> list[tuple[str, bytes]] | None:
    for candidate in (folder / name for name in _FOLDERS):
        for suffix in ("", ".bin"):
            paths = [candidate / (stem + suffix) for stem in _STEMS[split]]
            if not paths[0].is_file():
                continue
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise DataError(f"{missing[0]}: missing beside {paths[0].name}")
            try:
                return [(str(path), read_bytes(path, _MOST_BYTES)) for path in paths]
            except OSError as error:
                raise DataError(f"{error.filename}: {error.strerror}") from error
    return None


def _from_archive(folder: Path, split: str) -> list[tuple[str, bytes]] | None:
    for name in _ARCHIVES:
        path = folder / name
        if not path.is_file():
            continue
        suffix = ".bin" if "binary" in name else ""
        wanted = [stem + suffix for stem in _STEMS[split]]
        found: dict[str, bytes] = {}
        try:
            # Members are read in memory: nothing in the archive decides where a file is written.
            with gzip.open(path) as unpacked, tarfile.open(None, "r|", _Bounded(unpacked)) as archive:  # type: ignore[call-overload]
                for number, member in enumerate(archive):
                    if number == _MOST_MEMBERS:  # half a kilobyte each, all of which tarfile remembers
                        raise tarfile.ReadError(f"more than {_MOST_MEMBERS} members")
                    base = member.name.rsplit("/", 1)[-1]
                    if base in wanted and member.isfile() and member.size <= _MOST_BYTES:
                        if base in found:
                            raise tarfile.ReadError(f"{base} stands twice")
                        stream = archive.extractfile(member)
                        assert stream is not None  # isfile() above
                        found[base] = stream.read()
        # On a damaged header, tarfile may raise anything.
        except Exception as error:
            reason = brief(error) or type(error).__name__
            raise DataError(f"{path}: cannot be read, truncated or not the CIFAR-10 archive ({reason})") from error
        missing = [base for base in wanted if base not in found]
        if missing:
            raise DataError(f"{path}: has no {missing[0]}: not the CIFAR-10 archive, or truncated")
        return [(f"{path}:{base}", found[base]) for base in wanted]
    return None


class _Bounded:
    """The unpacked stream of an archive, up to a limit: a few bytes may unpack to any number of them."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream, self._left = stream, _MOST_UNPACKED

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {_MOST_UNPACKED} bytes")
        return content


def _assemble(contents: list[tuple[str, bytes]]) -> Dataset:
    batches = [read_batch(content, label) for label, content in contents]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Dataset.from_bytes("cifar10", pixels.reshape(-1, *_SHAPE), labels, CLASSES)
