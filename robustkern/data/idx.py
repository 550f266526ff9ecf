"""IDX files, the format of MNIST and its relatives, plain or gzip-compressed.

A file is: two zero bytes, a type code (8 for unsigned bytes), the number of dimensions, each dimension as a big-endian
32-bit integer, then the values in row-major order.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from robustkern._files import open_regular

from .dataset import DataError, Dataset

_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 256 << 20  # unpacked; MNIST's have 47 MB
_SPLITS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
           "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes, plain or `.gz`.

    Args:
        path: The file.
        dimensions: How many dimensions it must have.

    Raises:
        DataError: The file is not such an IDX file, is truncated, or would hold more than 256 MiB.
    """
    header = 4 + 4 * dimensions
    try:
        with open_regular(path) as file, gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file as stream:
            begin = stream.read(header)
            if len(begin) < header or begin[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
                raise DataError(
                    f"{path}: not an IDX file of unsigned bytes in {dimensions} dimensions (begins with "
                    f"{begin[:4].hex()})"
                )
            shape = struct.unpack(f">{dimensions}I", begin[4:])
            expected = math.prod(shape)
            if not 0 < expected <= _MOST_BYTES:
                sizes = " x ".join(map(str, shape))
                raise DataError(f"{path}: its header promises {sizes} bytes, none or more than {_MOST_BYTES}")
            content = stream.read(expected + 1)  # a few bytes may unpack to any number of them
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read, truncated or not gzip ({reason})") from error
    if len(content) != expected:
        has = f"more than {expected}" if len(content) > expected else len(content)
        raise DataError(f"{path}: {has} bytes where its header promises {expected}: truncated or corrupt")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def find_idx(folders: list[Path], split: str) -> tuple[Path, Path] | None:
    """The image file and the label file of a split in the first folder that has both, compressed or not."""
    for folder in folders:
        found = [_either(folder, stem) for stem in _SPLITS[split]]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def _either(folder: Path, stem: str) -> Path | None:
    # The published archives have been unpacked with "-idx3" as well as ".idx3" in their names.
    paths = [folder / (name + suffix) for name in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    return next(filter(Path.is_file, paths), None)


def load_idx(name: str, classes: tuple[str, ...], folders: list[Path], split: str) -> Dataset | None:
    """A split from its image file and its label file in the first folder that has both; None if none has."""
    files = find_idx(folders, split)
    if files is None:
        return None
    pixels, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    if len(pixels) != len(labels):
        raise DataError(f"{files[0]} holds {len(pixels)} images but {files[1]} {len(labels)} labels")
    return Dataset.from_bytes(name, pixels[:, None], labels, classes)
