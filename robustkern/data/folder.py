"""A folder of images sorted into class folders: `DIR/train/<class>/*.png` and `DIR/test/<class>/*.png`."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from robustkern._packages import pip_install
from robustkern._text import brief, plain

from .dataset import DataError, Dataset, DataWarning
from .randomness import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")  # some of Pillow's other readers run other programs
MOST_BYTES = 64 << 20  # of an image file
_MOST_PIXELS = 1 << 24
_ORIENTATION = 0x0112  # of EXIF
SEED = 0  # of the order of a folder's images


def load_folder(root: Path, split: str) -> Dataset:
    """A split of an image folder. All images must have one size; grey and colour may not be mixed.

    Reads PNG, JPEG, BMP, WebP and PPM (PGM, PBM) in any of Pillow's modes.  Grey stays grey, [1, H, W]; everything else
    becomes RGB, [3, H, W]; RGB with three equal channels counts as grey if other images are grey.  An 8-bit value v
    becomes v / 255, 16-bit grey v / 65535; of 16-bit colour Pillow keeps the upper 8 bits.  EXIF's orientation is
    applied.
    An alpha channel, or a transparent colour, must be opaque throughout: what a transparent pixel shows depends on what
    lies behind it, so such an image is refused.

    The images come in a random order that a fixed seed decides, so that the first N are a sample of all classes.  The
    order stays the same as long as no file is added or removed.

    The classes are the folders in `train/`.  Names that begin with a dot are ignored.  Other files, and
    folders inside those of the classes, are skipped with a `DataWarning` that names and counts them.

    Raises:
        DataError: A class of the training set has no image, or one of the images cannot be read, has another size, is
            transparent or larger than 2^24 pixels or 64 MiB.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"reading image folders needs Pillow: {pip_install('PIL')}") from error
    folder, base = root / split, base_of(root, split)
    classes, found, skipped = class_folders(folder, base)
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        # A class may have no test images, and then its folder may be missing.
        nested, inside = entries(folder / name) if name in found else ([], [])
        images = [file for file in inside if file.lower().endswith(SUFFIXES)]
        if not images and folder == base:
            raise DataError(f"{folder / name}: a class without an image ({', '.join(SUFFIXES)})")
        files += [(folder / name / file, label) for file in images]
        skipped += [f"{name}/{other}/" for other in nested]
        skipped += [f"{name}/{file}" for file in inside if not file.lower().endswith(SUFFIXES)]
    if not files:
        raise DataError(f"{folder}: no images in its class folders ({', '.join(SUFFIXES)})")
    if skipped:
        names = ", ".join([plain(name) for name in skipped[:3]] + ["..."] * (len(skipped) > 3))
        warnings.warn(
            f"{folder}: skipped {len(skipped)} that {'is' if len(skipped) == 1 else 'are'} no image in the folder of a "
            f"class: {names}",
            DataWarning,
            stacklevel=3,
        )
    return Dataset(str(root), *_read(files), classes)


def base_of(root: Path, split: str) -> Path:
    """The folder that names the classes: train/, so that a class without test images keeps its index."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; an image folder has train/ and test/, each with one folder per class")
    return root / "train" if (root / "train").is_dir() else folder


def class_folders(folder: Path, base: Path) -> tuple[tuple[str, ...], list[str], list[str]]:
    """All classes, those that have a folder in `folder`, and what else lies there."""
    known = entries(base)
    classes = tuple(known[0])
    if len(classes) < 2:
        raise DataError(f"{base}: needs at least two class folders, has {len(classes)}")
    found, others = known if folder == base else entries(folder)
    if strangers := set(found) - set(classes):
        raise DataError(f"{folder}: class {min(strangers)} does not occur in {base}")
    return classes, found, others


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of everything else in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            seen = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    return [name for name, is_folder in seen if is_folder], [name for name, is_folder in seen if not is_folder]


def _read(files: list[tuple[Path, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, in the order that the seed decides."""
    order = torch.randperm(len(files), generator=generator(SEED, "folder"))
    images: Any = np.empty(0, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about odd files that it can read all the same
        for (path, _), place in zip(files, order.argsort().tolist(), strict=True):
            image = read_image(path).transpose(2, 0, 1)
            if not images.size:
                try:
                    images = np.zeros((len(files), *image.shape), np.float32)
                except MemoryError as error:
                    raise DataError(f"{len(files)} images such as {path} do not fit into memory") from error
            if image.shape[0] > images.shape[1] and _is_grey(image[None]):
                image = image[:1]
            elif image.shape[0] < images.shape[1] and _is_grey(images):
                images = images[:, :1].copy()
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"{path}: size {list(image.shape)}, but those before it are {list(images.shape[1:])} [C, H, W]; "
                    "images of any sizes are read with an image size, to which they are scaled"
                )
            images[place] = image
    return torch.from_numpy(images), torch.tensor([label for _, label in files])[order]


def _is_grey(images: np.ndarray) -> bool:
    """Whether the channels of images, [N, C, H, W], are the same: WebP and some writers have no other grey."""
    return bool((images == images[:, :1]).all())


def read_image(path: Path) -> np.ndarray:
    """An image in [0, 1], [H, W, 1] or [H, W, 3], float32.

    Args:
        path: The file; its content decides the format, not its suffix.
    """
    with opened(path) as image:
        return _pixels(image, path)


@contextmanager
def opened(path: Path | str, content: IO[bytes] | None = None) -> Iterator[Any]:
    """An image file, opened by Pillow; whatever goes wrong with it, there or inside, is a DataError that names it.

    Args:
        path: The file, or what messages call it.
        content: What is read in place of the file.
    """
    from PIL import Image

    try:
        if content is not None:
            with Image.open(content, formats=_FORMATS) as image:
                yield image
            return
        status = os.stat(path)  # before it is opened: a pipe may never end
        if status.st_size > MOST_BYTES or not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: larger than {MOST_BYTES >> 20} MiB, or no regular file")
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except DataError:
        raise
    # Pillow's decoders raise many kinds of error on damaged files, SyntaxError among them.
    except Exception as error:
        reason = brief(getattr(error, "strerror", None) or error)
        raise DataError(f"{path}: not a readable image ({reason})") from error


def check_image(image: Any, path: Path) -> str:
    """How the pixels are stored; DataError if the image is too large, an animation or transparent."""
    if image.width * image.height > _MOST_PIXELS:
        raise DataError(f"{path}: {image.width} x {image.height} are more than {_MOST_PIXELS} pixels")
    # The further pictures of a photograph (MPO) are previews and depth maps, which do not count.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{path}: an animation of {image.n_frames} pictures")
    stored = stored_as(image)
    transparent = False
    if image.mode.endswith("A") or "transparency" in image.info:
        # Pillow compares a transparent colour with 8-bit pixels, however many bits the colour has.
        transparent = "transparency" in image.info and stored in ("L;2", "L;4", "I;16B", "RGB;16B")
        transparent = transparent or image.convert("RGBA").getchannel("A").getextrema()[0] < 255
    if transparent:
        raise DataError(f"{path}: partly transparent, and its looks depend on what lies behind: put it on a background")
    return stored


def stored_as(image: Any) -> str:
    """Bits and channels in the file, before Pillow converts them to 8 bits; "" if nobody knows."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles else ""


def orientation(image: Any) -> int:
    """EXIF's: 1 as stored, from 5 on with height and width exchanged."""
    return int(image.getexif().get(_ORIENTATION, 1))


def is_grey(image: Any, stored: str) -> bool:
    """Whether the pixels of an image of Pillow are grey."""
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") or stored == "LA;16B"


def _pixels(image: Any, path: Path) -> np.ndarray:
    from PIL import ImageOps

    stored = check_image(image, path)
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image).astype(np.float32) / np.float32(1 if image.mode == "F" else 65535)
        if not (array.min() >= 0 and array.max() <= 1):
            raise DataError(f"{path}: values outside the range of 16 bits, or of [0, 1] for floating point")
    else:
        mode = "L" if is_grey(image, stored) else "RGB"
        array = np.asarray(image if image.mode == mode else image.convert(mode)) / np.float32(255)
    return array.reshape(*array.shape[:2], -1)
