"""Random choices that depend on (seed, epoch) alone.

No generator lives longer than one call, so there is no hidden state to save: a run that is resumed in the middle of an
epoch sees the same order and the same crops as one that was never interrupted.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = (1 << 64) - 1


def generator(seed: int, stream: str, *counters: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator keyed by (seed, stream, counters); equal keys give equal numbers, different keys unrelated ones.

    >>> from robustkern.data import generator
    >>> a, b = (torch.rand(1, generator=generator(0, "mine", 3)) for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    key = _mix(seed & _MASK)
    for byte in stream.encode():
        key = _mix(key ^ byte)
    for counter in counters:
        key = _mix(key ^ (counter & _MASK))
    # PyTorch's CPU generator reads only the low 32 bits of its seed, so both halves are folded into them.
    return torch.Generator(device).manual_seed((key ^ (key >> 32)) & 0xFFFFFFFF)


def _mix(z: int) -> int:
    """One round of SplitMix64: a bijection of 64-bit integers in which neighbouring inputs end far apart."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which epoch `epoch` visits `count` samples.  [count] int64

    >>> from robustkern.data import epoch_order
    >>> sorted(epoch_order(seed=0, epoch=1, count=5).tolist())
    [0, 1, 2, 3, 4]
    """
    return torch.randperm(count, generator=generator(seed, "order", epoch))


@dataclass(frozen=True)
class CropFlip:
    """Random crops of zero-padded images and, if asked for, random horizontal flips.

    Attributes:
        padding: Pixels added on each side before cropping back to the original size.
        flip: Whether an image is mirrored with probability 1/2.

    >>> from robustkern.data import CropFlip
    >>> images = torch.rand(4, 3, 32, 32)
    >>> CropFlip()(images, torch.arange(4), seed=0, epoch=0, count=4).shape
    torch.Size([4, 3, 32, 32])
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, indices: Tensor, *, seed: int, epoch: int, count: int) -> Tensor:
        """Augment a batch.

        Args:
            images: The batch.  [B, C, H, W]
            indices: Which samples of the data set these are: each sample has its own draw.  [B]
            seed: Seed of the run.
            epoch: Epoch, counted from 0.
            count: Size of the data set.
        """
        draws = generator(seed, "augmentation", epoch)
        offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=draws)[indices]
        flips = torch.rand(count, generator=draws)[indices] < 0.5
        batch, _, height, width = images.shape
        rows = offsets[:, :1] + torch.arange(height)  # [B, H]
        columns = offsets[:, 1:] + torch.arange(width)  # [B, W]
        if self.flip:
            columns = torch.where(flips[:, None], columns.flip(1), columns)
        padded = F.pad(images, (self.padding,) * 4).movedim(1, 3)  # [B, H + 2 padding, W + 2 padding, C]
        picked = padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return picked.movedim(3, 1).contiguous()
