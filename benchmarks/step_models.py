"""The networks whose training steps are timed, by their names in the tables."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor, nn

from robustkern import models

Shape = tuple[int, int, int]  # channels, height, width
CLASSES = 10


def preact_resnet(width: int, blocks: tuple[int, ...], norm: str = "BatchNorm") -> Callable[[Shape], nn.Module]:
    """A pre-activation ResNet whose first stage has `width` channels, normalised by BatchNorm or GroupNorm."""

    def build(shape: Shape) -> nn.Module:
        widths = tuple(width * 2**stage for stage in range(len(blocks)))
        network = models.PreActResNet(CLASSES, shape, blocks, widths=widths)
        if norm == "GroupNorm":
            _replace_batch_norm(network)
        return network

    return build


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(min(32, child.num_features // 4), child.num_features))
        else:
            _replace_batch_norm(child)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm over the channels, two linear layers with GELU between, layer scale.

    In the order of dimensions that the paper's authors chose for speed: the channels come last between the
    convolution and the sum (Liu et al., A ConvNet for the 2020s, CVPR 2022).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        # Far from the 1e-6 that training starts with: the blocks must matter to the gradients that are compared.
        self.scale = nn.Parameter(0.1 * self.norm.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(x).permute(0, 2, 3, 1)
        out = self.scale * self.project(F.gelu(self.expand(self.norm(out))))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A 2x2 patch embedding, `depth` blocks and a linear classifier of the averaged features."""

    def __init__(self, shape: Shape, channels: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], channels, 2, stride=2)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.blocks(self.stem(x)).mean(dim=(2, 3))))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer: patches, learnt positions, `depth` blocks, the mean of the tokens."""

    def __init__(self, shape: Shape, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(shape[0], width, patch, stride=patch)
        tokens = (shape[1] // patch) * (shape[2] // patch)
        self.positions = nn.Parameter(nn.init.trunc_normal_(self.embed.weight.new_empty(tokens, width), std=0.02))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.blocks(tokens)).mean(dim=1))


def conv_bn_relu(shape: Shape) -> nn.Module:
    """Three 3x3 convolutions of 64 channels, each with BatchNorm and ReLU, and a linear classifier.

    The network of https://github.com/pytorch/pytorch/issues/3076, whose penalised step took 30 plain ones in 2017.
    """
    layers: list[nn.Module] = []
    channels = shape[0]
    for _ in range(3):
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
        channels = 64
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, CLASSES))


def mlp(shape: Shape) -> nn.Module:
    features = shape[0] * shape[1] * shape[2]
    layers = [nn.Linear(features, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, CLASSES)]
    return nn.Sequential(nn.Flatten(), *layers)


def pytorchcv_resnet(shape: Shape) -> nn.Module:
    """PreResNet-20 for CIFAR-10 as the package pytorchcv defines it."""
    from pytorchcv.models.preresnet_cifar import preresnet20_cifar10

    return preresnet20_cifar10(in_channels=shape[0], in_size=shape[1:])


def x_transformers_vit(shape: Shape) -> nn.Module:
    """A vision transformer as the package x-transformers defines it."""
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=192, depth=4, heads=3, attn_flash=False)
    return ViTransformerWrapper(
        image_size=shape[1], patch_size=4, channels=shape[0], num_classes=CLASSES, attn_layers=layers
    )


RESNET18 = (2, 2, 2, 2)

MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "PreAct-ResNet-18, BatchNorm": preact_resnet(64, RESNET18),
    "PreAct-ResNet-18 of width 32, BatchNorm": preact_resnet(32, RESNET18),
    "PreAct-ResNet-18 of width 32, GroupNorm": preact_resnet(32, RESNET18, "GroupNorm"),
    "ConvNeXt blocks": lambda shape: ConvNeXt(shape, channels=96, depth=4),
    "ViT": lambda shape: ViT(shape, patch=4, width=192, depth=4, heads=3),
    "ViT-B/16": lambda shape: ViT(shape, patch=16, width=768, depth=12, heads=12),
    "conv-BatchNorm-ReLU of PyTorch issue 3076": conv_bn_relu,
    "PreAct-ResNet-18 of PyTorch issue 7714": preact_resnet(64, RESNET18),
    "pytorchcv PreResNet-20": pytorchcv_resnet,
    "x-transformers ViT": x_transformers_vit,
    "MLP with GELU": mlp,
    "tiny PreAct-ResNet, BatchNorm": preact_resnet(8, (1, 1)),
    "tiny PreAct-ResNet, GroupNorm": preact_resnet(8, (1, 1), "GroupNorm"),
    "tiny ConvNeXt": lambda shape: ConvNeXt(shape, channels=8, depth=1),
    "tiny ViT": lambda shape: ViT(shape, patch=4, width=16, depth=1, heads=2),
}
# Models that call scaled_dot_product_attention.  PyTorch's fused kernels of it have no second derivative, so whoever
# penalises a gradient without robustkern selects SDPBackend.MATH, and so do the stock columns.
ATTENTION = {"ViT", "ViT-B/16", "tiny ViT"}
_PACKAGES = {"pytorchcv PreResNet-20": "pytorchcv", "x-transformers ViT": "x_transformers"}


def available(name: str) -> bool:
    """Whether the package that defines the model is installed."""
    return name not in _PACKAGES or find_spec(_PACKAGES[name]) is not None
