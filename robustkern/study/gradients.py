"""What an input gradient looks like, in numbers: how far it points along the image, how smooth it is, where it lies."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkern.training.evaluation import input_gradients as input_gradients


def alignment(gradient: Tensor, x: Tensor, *, centred: bool = False, cosine: bool = True) -> Tensor:
    r"""|<x, g>| / (||x|| ||g||) for each sample, or |<x, g>| / ||g|| for cosine=False: [B].

    How far a gradient points along its image; without the cosine, in units of the image, the distance by which x would
    have to move along g to reach the plane through the origin (Etmann et al., ICML 2019).  Zero for a zero gradient.

    Args:
        gradient: [B, C, H, W]
        x: The images it was taken at.  [B, C, H, W]
        centred: Subtract from each image its own mean first: the absolute correlation of image and gradient, which a
            gradient that merely brightens the whole image does not have.
        cosine: Divide by the length of the image.

    >>> from robustkern.study import alignment
    >>> x = torch.rand(2, 1, 4, 4)
    >>> alignment(3 * x, x).round(decimals=4).tolist()
    [1.0, 1.0]
    """
    g, image = _flat(gradient), _flat(x)
    if centred:
        image, g = image - image.mean(1, keepdim=True), g - g.mean(1, keepdim=True)
    product = (g * image).sum(1).abs()
    length = g.norm(dim=1) * (image.norm(dim=1) if cosine else 1.0)
    return torch.where(length > 0, product / length.clamp_min(torch.finfo(product.dtype).tiny), 0)


def low_frequency_share(gradient: Tensor, radius: float = 0.25) -> Tensor:
    r"""sum_{|f| <= radius} |G(f)|^2 / sum_{f != 0} |G(f)|^2 for each sample, G the Fourier transform: [B].

    The share of a gradient's energy, its mean left out, in spatial frequencies below `radius` cycles a pixel; 0.5 is
    the finest that pixels can show along an axis.  White noise has about the share of the disc's area, pi radius^2.

    Args:
        gradient: [B, C, H, W]
        radius: In cycles a pixel, in (0, 0.71].

    Raises:
        ValueError: The radius is out of range.

    >>> from robustkern.study import low_frequency_share
    >>> wave = torch.cos(2 * torch.pi * torch.arange(16) / 16).expand(1, 1, 16, 16)
    >>> low_frequency_share(wave).round(decimals=4).tolist()
    [1.0]
    """
    if not 0 < radius <= 0.71:
        raise ValueError(f"low_frequency_share: radius must be in (0, 0.71] cycles a pixel, got {radius}")
    height, width = gradient.shape[-2:]
    power = torch.fft.fft2(_accurate(gradient)).abs().square()
    rows = torch.fft.fftfreq(height, device=gradient.device, dtype=power.dtype)
    columns = torch.fft.fftfreq(width, device=gradient.device, dtype=power.dtype)
    frequency = torch.hypot(rows[:, None], columns[None, :])
    power[..., 0, 0] = 0.0
    total = power.sum((1, 2, 3))
    low = (power * (frequency <= radius)).sum((1, 2, 3))
    return torch.where(total > 0, low / total.clamp_min(torch.finfo(power.dtype).tiny), 0)


def total_variation_ratio(gradient: Tensor) -> Tensor:
    r"""(sum |g_{h+1,w} - g_{h,w}| + sum |g_{h,w+1} - g_{h,w}|) / (2 sum |g|) for each sample: [B].

    How rough a gradient is, whatever its size: 0 for a constant, 2 for a chessboard (minus what the border lacks),
    sqrt(2) for white Gaussian noise (likewise).

    Args:
        gradient: [B, C, H, W]

    >>> from robustkern.study import total_variation_ratio
    >>> total_variation_ratio(torch.ones(1, 1, 4, 4)).tolist()
    [0.0]
    """
    g = _accurate(gradient)
    variation = g.diff(dim=2).abs().sum((1, 2, 3)) + g.diff(dim=3).abs().sum((1, 2, 3))
    size = 2 * g.abs().sum((1, 2, 3))
    return torch.where(size > 0, variation / size.clamp_min(torch.finfo(g.dtype).tiny), 0)


def edge_concentration(gradient: Tensor, x: Tensor, share: float = 0.2) -> Tensor:
    r"""(energy of g on the `share` of pixels with the strongest edges of x, over all its energy) / share: [B].

    1 for a gradient that is unrelated to the image's edges, up to 1 / share for one that lies on them alone.  Edges
    are magnitudes of Sobel's operator on the mean over channels, the border replicated.

    Args:
        gradient: [B, C, H, W]
        x: The images.  [B, C, H, W]
        share: Share of the pixels, in (0, 1).

    Raises:
        ValueError: The share is out of range.

    >>> from robustkern.study import edge_concentration
    >>> edge_concentration(torch.ones(1, 1, 8, 8), torch.rand(1, 1, 8, 8)).shape
    torch.Size([1])
    """
    if not 0 < share < 1:
        raise ValueError(f"edge_concentration: share must be in (0, 1), got {share}")
    energy = _accurate(gradient).square().sum(1).flatten(1)
    grey = F.pad(_accurate(x).mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=grey.dtype, device=grey.device)
    edges = F.conv2d(grey, torch.stack([sobel, sobel.t()])[:, None]).norm(dim=1).flatten(1)
    count = max(1, round(share * edges.shape[1]))
    strongest = edges.topk(count, dim=1).indices
    total = energy.sum(1)
    found = energy.gather(1, strongest).sum(1) / (count / edges.shape[1])
    return torch.where(total > 0, found / total.clamp_min(torch.finfo(energy.dtype).tiny), 0)


def white_noise_baseline(shape: tuple[int, int, int], radius: float = 0.25) -> dict[str, float]:
    """What the measures give for Gaussian white noise of this shape (C, H, W): the zero of their scales.

    Args:
        shape: Channels, height and width.
        radius: As for `low_frequency_share`.

    >>> from robustkern.study import white_noise_baseline
    >>> white_noise_baseline((1, 8, 8))["low_frequency_share"] < 1
    True
    """
    channels, height, width = shape
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    inside = (torch.hypot(rows[:, None], columns[None, :]) <= radius).sum() - 1
    pairs = (height - 1) * width + height * (width - 1)
    return {
        "low_frequency_share": float(inside) / (height * width - 1),
        "total_variation_ratio": pairs * math.sqrt(2) / (2 * height * width),
        "edge_concentration": 1.0,
        "alignment": math.sqrt(2 / (math.pi * channels * height * width)),
    }


def _accurate(t: Tensor) -> Tensor:
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


def _flat(t: Tensor) -> Tensor:
    return _accurate(t).flatten(1)
