"""A small convolutional network for 8x8 to 32x32 images: what a laptop trains in minutes."""

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Convolutions down to at most 8x8 pixels, then two linear layers; no normalisation layers.

    Images larger than 16x16 are halved by every convolution, so that nothing is computed at their full size;
    smaller ones see one convolution before they are halved.

    The activation is SiLU. The input gradient of a piecewise linear network is piecewise constant, so that a
    penalty on it learns little about how it changes nearby; with a smooth activation flatness at the data reaches
    further around it. There is no BatchNorm, which would mix the samples whose gradients are penalised.

    Args:
        num_classes: Number of logits.
        in_shape: Channels, height and width of an image.
        width: Channels of the first convolution; the others have twice as many.
        features: Width of the hidden linear layer.

    >>> from robustkern.models import SmallCNN
    >>> SmallCNN(10, (3, 32, 32))(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, in_shape: tuple[int, int, int], width: int = 16, features: int = 128) -> None:
        super().__init__()
        channels, *size = in_shape
        stride = 2 if max(size) > 16 else 1
        layers: list[nn.Module] = []
        for out in (width, 2 * width, 2 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.SiLU()]
            size = [-(-side // stride) for side in size]
            channels = out
            stride = 2 if max(size) > 8 or stride == 1 else 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size[0] * size[1], features), nn.SiLU(), nn.Linear(features, num_classes)
        )
        hidden = [module for module in self.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][:-1]
        for module in hidden:
            # PyTorch's default shrinks the signal from layer to layer. The penalty then outweighs the loss before
            # training has begun, and the nearest minimum is a constant classifier.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return self.classifier(self.features(x))
