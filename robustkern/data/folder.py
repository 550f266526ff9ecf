"""A folder of images sorted into class folders: `DIR/train/<class>/*.png` and `DIR/test/<class>/*.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from robustkern._packages import pip_install

from .dataset import DataError, Dataset
from .randomness import generator

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_SEED = 0


def load_folder(root: Path, split: str) -> Dataset:
    """A split of an image folder. All images must have one size; grey and colour may not be mixed.

    They come in a random order that a fixed seed decides, the same at each call as long as no file is added or removed:
    the first so many of them are a sample of all classes.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"reading image folders needs Pillow: {pip_install('PIL')}") from error
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; an image folder has train/ and test/, each with one folder per class")
    # The classes are those of train/, so that a class without test images keeps its index.
    base = root / "train" if (root / "train").is_dir() else folder
    classes = tuple(sorted(path.name for path in base.iterdir() if path.is_dir()))
    if len(classes) < 2:
        raise DataError(f"{base}: needs at least two class folders, has {len(classes)}")
    strangers = {path.name for path in folder.iterdir() if path.is_dir()} - set(classes)
    if strangers:
        raise DataError(f"{folder}: class {sorted(strangers)[0]} does not occur in {base}")
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        # A class may have no test images, and then its folder may be missing.
        files = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        for path in files:
            if path.suffix.lower() not in _SUFFIXES:
                continue
            try:
                with Image.open(path) as image:
                    grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
                    array = np.asarray(image.convert("L" if grey else "RGB"))
            # Pillow's decoders raise many kinds of error on damaged files, SyntaxError among them.
            except Exception as error:
                raise DataError(f"{path}: not a readable PNG or JPEG image ({error})") from error
            array = array.reshape(*array.shape[:2], -1)
            if arrays and array.shape != arrays[0].shape:
                raise DataError(f"{path}: size {array.shape}, but the first image is {arrays[0].shape} (H, W, C)")
            arrays.append(array)
            labels.append(label)
    if not arrays:
        raise DataError(f"{folder}: no PNG or JPEG images in its class folders")
    order = torch.randperm(len(labels), generator=generator(_SEED, "folder"))
    pixels = torch.from_numpy(np.stack([arrays[i] for i in order.tolist()])).permute(0, 3, 1, 2)
    return Dataset(str(root), (pixels.float() / 255).contiguous(), torch.tensor(labels)[order], classes)
