"""Augmentation of a batch on its device, by kornia: every draw is a function of (seed, epoch, sample), so that it does
not matter which samples share a batch, or which process has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustkern._packages import pip_install

from .dataset import DataError
from .randomness import generator

_ERASED = (0.02, 1 / 3)  # share of the image's area
_ASPECT = (0.3, 1 / 0.3)
_OF_OPERATION, _OF_COLOURS, _OF_ERASING = 2, 3, 5  # draws

# (images, strength from 0 to 1 with a sign, kornia) -> images; each image has a strength of its own
Operation = Callable[[Tensor, Tensor, Any], Tensor]


def _factor(strength: Tensor) -> Tensor:
    return 1 + 0.9 * strength


# The operations and the largest strengths of RandAugment; those that need colours come last.
_OPERATIONS: tuple[Operation, ...] = (
    lambda x, s, k: k.enhance.normalize_min_max(x),
    lambda x, s, k: k.enhance.equalize(x),
    lambda x, s, k: k.geometry.transform.rotate(x, 30 * s),
    lambda x, s, k: k.enhance.posterize(x, (8 - 4 * s.abs()).round().int()),
    lambda x, s, k: k.enhance.solarize(x, 256 / 255 * (1 - s.abs())),
    lambda x, s, k: k.enhance.adjust_brightness(x, _factor(s)),
    lambda x, s, k: k.enhance.adjust_contrast(x, _factor(s)),
    lambda x, s, k: k.enhance.sharpness(x, _factor(s)),
    lambda x, s, k: k.geometry.transform.shear(x, torch.stack([0.3 * s, 0 * s], 1)),
    lambda x, s, k: k.geometry.transform.shear(x, torch.stack([0 * s, 0.3 * s], 1)),
    lambda x, s, k: k.geometry.transform.translate(x, torch.stack([0.45 * x.shape[3] * s, 0 * s], 1)),
    lambda x, s, k: k.geometry.transform.translate(x, torch.stack([0 * s, 0.45 * x.shape[2] * s], 1)),
    lambda x, s, k: k.enhance.adjust_saturation(x, _factor(s)),
)
_IN_COLOUR = 1


@dataclass(frozen=True)
class BatchAugmentation:
    """RandAugment (Cubuk et al. 2020), then colours, then random erasing (Zhong et al. 2020).

    Attributes:
        randaugment: Operations that each image goes through, of 13 (12 for grey images); 0: none.
        magnitude: Their strength, 0 to 10.
        colour: Brightness, contrast and, in colour, saturation times a factor from 1 - colour to 1 + colour.
        erasing: Probability that a rectangle becomes grey.
    """

    randaugment: int = 0
    magnitude: float = 9.0
    colour: float = 0.0
    erasing: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.randaugment or self.colour or self.erasing)

    def __call__(self, x: Tensor, samples: Tensor, *, seed: int, epoch: int) -> Tensor:
        """The augmented batch.

        Args:
            x: Images in [0, 1].  [B, C, H, W]
            samples: Which samples of the data set they are.  [B]
            seed: Seed of the run.
            epoch: Epoch, from 0.

        Raises:
            DataError: kornia is not installed, and RandAugment or colours are asked for.
        """
        count = _OF_OPERATION * self.randaugment + _OF_COLOURS + _OF_ERASING
        keys = [generator(seed, "batch-augmentation", epoch, sample) for sample in samples.tolist()]
        draws = torch.stack([torch.rand(count, generator=key) for key in keys])
        for layer in range(self.randaugment):
            x = self._one_operation(x, draws[:, _OF_OPERATION * layer :])
        draws = draws[:, _OF_OPERATION * self.randaugment :]
        if self.colour:
            x = self._colours(x, draws)
        return self._erase(x, draws[:, _OF_COLOURS:]) if self.erasing else x

    def _one_operation(self, x: Tensor, draws: Tensor) -> Tensor:
        kornia, operations = _kornia(), len(_OPERATIONS) - (0 if x.shape[1] == 3 else _IN_COLOUR)
        chosen = (draws[:, 0] * operations).long()
        strength = torch.where(draws[:, 1] < 0.5, -1.0, 1.0) * (self.magnitude / 10)
        out = x.clone()
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0].to(x.device)
            out[rows] = _OPERATIONS[number](x[rows], strength.to(x.device)[rows], kornia).clamp(0, 1)
        return out

    def _colours(self, x: Tensor, draws: Tensor) -> Tensor:
        kornia = _kornia()
        factors = (1 + self.colour * (2 * draws[:, :3] - 1)).to(x.device)
        x = kornia.enhance.adjust_brightness(x, factors[:, 0])
        x = kornia.enhance.adjust_contrast(x, factors[:, 1])
        return kornia.enhance.adjust_saturation(x, factors[:, 2]).clamp(0, 1) if x.shape[1] == 3 else x.clamp(0, 1)

    def _erase(self, x: Tensor, draws: Tensor) -> Tensor:
        """In each image, with a probability, a rectangle of a random share of the area and a random shape."""
        height, width = x.shape[2:]
        area = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * draws[:, 0]
        low, high = np.log(_ASPECT)
        shape = torch.exp(low + (high - low) * draws[:, 1])
        tall = (height * (area * shape).sqrt()).round().clamp(1, height)
        wide = (width * (area / shape).sqrt()).round().clamp(1, width)
        top, left = (draws[:, 2] * (height - tall)).floor(), (draws[:, 3] * (width - wide)).floor()
        erased = draws[:, 4] < self.erasing
        rows, columns = torch.arange(height), torch.arange(width)
        inside = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
        across = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
        mask = (inside[:, :, None] & across[:, None, :] & erased[:, None, None])[:, None]
        return torch.where(mask.to(x.device), x.new_tensor(0.5), x)


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbours in the whole batch: 0 and 1, 2 and 3, ...

    x_i becomes lambda x_i + (1 - lambda) x_j, or gets a rectangle of x_j with 1 - lambda of the area; labels become
    lambda and 1 - lambda of both classes. lambda ~ Beta(alpha, alpha), one for each pair. The last image of an odd
    number stays as it is.

    Attributes:
        mixup: alpha; 0: no mixup.
        cutmix: alpha; 0: no CutMix. With both, each pair is mixed by either with probability 1/2.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)

    @staticmethod
    def with_partners(offset: int, size: int, total: int) -> tuple[int, int]:
        """The first and the last row + 1 that a process needs to mix these rows of the whole batch."""
        return offset - offset % 2, min(total, offset + size + (offset + size) % 2)

    def __call__(
        self, x: Tensor, y: Tensor, classes: int, *, offset: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Mixed images and float32 probabilities.

        Args:
            x: Rows of the whole batch from an even one on, whole pairs but for the batch's last.  [B, C, H, W]
            y: Their classes.  [B]
            classes: How many there are.
            offset: Number of the first of these rows in the whole batch.
            seed: Seed of the run.
            step: Number of the step.
        """
        soft = F.one_hot(y, classes).float()
        pairs = len(x) // 2
        if not pairs:
            return x, soft
        # Drawn for the pairs before as well, so that they are those of the whole batch.
        key = generator(seed, "mixing", step).initial_seed()
        draws = np.random.Generator(np.random.PCG64(key)).random((offset // 2 + pairs, 8))[offset // 2 :]
        height, width = x.shape[2:]
        alpha, cut = np.full(pairs, self.mixup), np.zeros(pairs, bool)
        if self.cutmix:
            cut = draws[:, 0] < 0.5 if self.mixup else np.ones(pairs, bool)
            alpha = np.where(cut, self.cutmix, self.mixup)
        kept = np.array([_beta(a, row) for a, row in zip(alpha, draws[:, 1:], strict=True)])
        masks = torch.from_numpy(kept).float()[:, None, None].repeat(1, height, width)  # what each keeps of itself
        for pair in np.flatnonzero(cut):
            masks[pair], kept[pair] = _without_rectangle(height, width, kept[pair], draws[pair, 6:])
        mask = masks.repeat_interleave(2, 0)[:, None].to(x.device)
        share = torch.from_numpy(kept).float().repeat_interleave(2)[:, None].to(x.device)
        paired, labels = x[: 2 * pairs], soft[: 2 * pairs]
        others, their_labels = (part.unflatten(0, (pairs, 2)).flip(1).flatten(0, 1) for part in (paired, labels))
        mixed = mask * paired + (1 - mask) * others
        labels = share * labels + (1 - share) * their_labels
        return torch.cat([mixed, x[2 * pairs :]]), torch.cat([labels, soft[2 * pairs :]])


def _beta(alpha: float, draws: np.ndarray) -> float:
    """A number from Beta(alpha, alpha); a function of the draws."""
    key = int(draws[0] * 2**53)
    return float(np.random.Generator(np.random.PCG64(key)).beta(alpha, alpha))


def _without_rectangle(height: int, width: int, kept: float, draws: np.ndarray) -> tuple[Tensor, float]:
    """A mask of ones with a rectangle of zeros about 1 - kept of its area, and the mean of the mask."""
    side = float(np.sqrt(1 - kept))
    middle = draws * (height, width)
    top, bottom = (int(np.clip(round(middle[0] + s * side * height / 2), 0, height)) for s in (-1, 1))
    left, right = (int(np.clip(round(middle[1] + s * side * width / 2), 0, width)) for s in (-1, 1))
    mask = torch.ones(height, width)
    mask[top:bottom, left:right] = 0
    return mask, float(mask.mean())


def _kornia() -> Any:
    try:
        import kornia
    except ImportError as error:
        raise DataError(f"augmentation of batches needs kornia: {pip_install('kornia')}") from error
    return kornia
