"""CIFAR-10 from the files of its published archives: the Python version (pickles) and the binary version.

Pickles run code when they are read. The Python version is therefore read with an unpickler that knows how to rebuild a
NumPy array of bytes and nothing else.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .dataset import DataError, Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_STEMS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MAX_BYTES = 64 << 20  # a batch file is 31 MB; anything larger is not one


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds containers, strings, numbers and NumPy arrays of bytes; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return _NdarrayMarker
        if (module, name) == ("numpy", "dtype"):
            return _uint8
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


class _NdarrayMarker:
    """Stands for numpy.ndarray: nothing in the file can call the real one."""


def _reconstruct(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    # As NumPy pickles an array: an empty one first, whose content comes with the BUILD instruction.
    if kind is not _NdarrayMarker:
        raise pickle.UnpicklingError("an array subclass")
    return np.empty((0,), dtype=np.uint8)


def _uint8(code: str | bytes, *flags: bool) -> np.dtype:
    # The published files hold no other type.
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of type {code!r}")
    return np.dtype(np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes in protocol 2. Any other codec could do work of its own.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding}")
    return text.encode("latin1")


def read_batch(content: bytes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] and labels [N], uint8, of one batch file of either version.

    Args:
        content: The whole file.
        label: What to call it in an error.
    """
    if label.endswith(".bin"):
        if not content or len(content) % (1 + _PIXELS):
            raise DataError(
                f"{label}: {len(content)} bytes are not whole records of {1 + _PIXELS}: truncated or corrupt"
            )
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _PIXELS)
        return records[:, 1:], records[:, 0]
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    # A pickle is a program: a damaged one can fail with nearly any exception.
    except Exception as error:
        raise DataError(f"{label}: not a CIFAR-10 batch that can be read safely ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or labels.shape != pixels.shape[:1]:
        raise DataError(f"{label}: not a CIFAR-10 batch: data {pixels.dtype} {pixels.shape}, labels {labels.shape}")
    return pixels, labels


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
            return [(str(path), path.read_bytes()) for path in paths]
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
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    base = member.name.rsplit("/", 1)[-1]
                    if base in wanted and member.isfile() and member.size <= _MAX_BYTES:
                        stream = archive.extractfile(member)
                        assert stream is not None  # isfile() above
                        found[base] = stream.read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read, truncated or not the CIFAR-10 archive ({error})") from error
        missing = [base for base in wanted if base not in found]
        if missing:
            raise DataError(f"{path}: has no {missing[0]}: not the CIFAR-10 archive, or truncated")
        return [(f"{path}:{base}", found[base]) for base in wanted]
    return None


def _assemble(contents: list[tuple[str, bytes]]) -> Dataset:
    batches = [read_batch(content, label) for label, content in contents]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).view(-1, *_SHAPE)
    return Dataset("cifar10", images, torch.from_numpy(labels.astype(np.int64)), CLASSES)
