"""Pre-activation ResNets for 32x32 images (He et al., Identity mappings in deep residual networks, ECCV 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Twice BatchNorm, ReLU and convolution, bridged by an identity or, where the shape changes, a 1x1 convolution."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The projection sees the pre-activation, the identity the raw input: as in the paper.
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet(nn.Module):
    """A stem, stages of `PreActBlock`s whose width grows as the image shrinks, and global average pooling.

    Args:
        num_classes: Number of logits.
        in_shape: Channels, height and width of an image.
        blocks: Number of blocks of each stage.
        widths: Channels of each stage; every stage but the first halves the image.
        stem: Channels of the first convolution; those of the first stage by default.

    >>> from robustkern.models import PreActResNet
    >>> PreActResNet(10, (3, 8, 8), blocks=(1, 1), widths=(8, 16))(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_shape: tuple[int, int, int],
        blocks: tuple[int, ...],
        widths: tuple[int, ...] = (64, 128, 256, 512),
        stem: int | None = None,
    ) -> None:
        super().__init__()
        channels = widths[0] if stem is None else stem
        layers: list[nn.Module] = [nn.Conv2d(in_shape[0], channels, 3, padding=1, bias=False)]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                layers.append(PreActBlock(channels, width, stride=2 if stage and not block else 1))
                channels = width
        self.features = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        out = F.relu(self.bn(self.features(x)))
        return self.classifier(out.mean(dim=(2, 3)))
