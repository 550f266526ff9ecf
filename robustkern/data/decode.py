"""One image of any size as bytes of one size: decoded, cropped, scaled, and mirrored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .dataset import DataError
from .folder import check_image, is_grey, orientation
from .randomness import generator

_RATIOS = (3 / 4, 4 / 3)  # of the width of a crop to its height
_TRIES = 10

Box = tuple[float, float, float, float]  # left, upper, right, lower


@dataclass(frozen=True)
class View:
    """How an image is cropped and scaled.

    For training, a random crop as in Inception (Szegedy et al. 2015) and its mirror image; for evaluation the square in
    the middle. Both are scaled to `size` x `size` by bicubic interpolation.

    Attributes:
        size: Height and width.
        crop_scale: Least share of the image's area that a random crop keeps.
        flip: Probability of the mirror image.
        center: Share of the shorter side that the square in the middle keeps.

    >>> from robustkern.data import View
    >>> View(224).center
    0.875
    """

    size: int
    crop_scale: float = 0.08
    flip: float = 0.5
    center: float = 0.875

    def middle(self, width: int, height: int) -> Box:
        side = self.center * min(width, height)
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side

    def draw(self, width: int, height: int, seed: int, epoch: int, sample: int) -> tuple[Box, bool]:
        """The crop of a sample in an epoch, and whether it is mirrored; a function of these numbers."""
        draws = torch.rand(1 + 4 * _TRIES, generator=generator(seed, "view", epoch, sample)).tolist()
        mirrored = draws.pop() < self.flip
        low, high = map(math.log, _RATIOS)
        for begin in range(0, len(draws), 4):
            area, ratio, across, down = draws[begin : begin + 4]
            pixels = width * height * (self.crop_scale + (1 - self.crop_scale) * area)
            shape = math.exp(low + (high - low) * ratio)
            w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if 0 < w <= width and 0 < h <= height:
                left, upper = int(across * (width - w + 1)), int(down * (height - h + 1))
                return (left, upper, left + w, upper + h), mirrored
        # The image is too long for all of these crops: as much of its middle as has an allowed shape.
        w = min(width, round(height * _RATIOS[1]))
        h = min(height, round(width / _RATIOS[0]))
        left, upper = (width - w) // 2, (height - h) // 2
        return (left, upper, left + w, upper + h), mirrored


def upright_size(image: Any) -> tuple[int, int]:
    """Width and height of an opened image as EXIF says it is to be seen."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def decode(image: Any, name: Any, channels: int, size: int, box: Box, mirrored: bool) -> np.ndarray:
    """An image as bytes.  [channels, size, size]

    Args:
        image: Opened by Pillow and not decoded yet: of a JPEG only as many pixels are decoded as the result needs.
        name: For messages.
        channels: 1 or 3. A grey image becomes a colour image; the reverse only if its channels are the same.
        size: Height and width of the result.
        box: What part of the image, as it is to be seen.
        mirrored: Whether left and right are exchanged.

    Raises:
        DataError: The image is transparent, an animation or too large, or has colours that one channel cannot hold.
    """
    from PIL import Image, ImageOps

    width, height = upright_size(image)
    scale = max(size / (box[2] - box[0]), size / (box[3] - box[1]))
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    stored = check_image(image, name)
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    grey = is_grey(image, stored)
    image = _eight_bits(image, name, "L" if grey else "RGB")
    across, down = image.width / width, image.height / height  # less than 1 if a smaller picture was decoded
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=part, reducing_gap=3.0)
    pixels = np.asarray(image).reshape(size, size, -1)
    if channels == 1 and pixels.shape[2] == 3:
        if (pixels != pixels[:, :, :1]).any():
            raise DataError(f"{name}: in colour, but the images looked at first are grey: convert one or the other")
        pixels = pixels[:, :, :1]
    pixels = np.broadcast_to(pixels[:, ::-1] if mirrored else pixels, (size, size, channels))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bits(image: Any, name: Any, mode: str) -> Any:
    """The image with 8 bits a channel."""
    from PIL import Image

    if not (image.mode.startswith("I") or image.mode == "F"):
        return image if image.mode == mode else image.convert(mode)
    values = np.asarray(image).astype(np.float32) / np.float32(1 if image.mode == "F" else 65535)
    if not (values.min() >= 0 and values.max() <= 1):
        raise DataError(f"{name}: values outside the range of 16 bits, or of [0, 1] for floating point")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
