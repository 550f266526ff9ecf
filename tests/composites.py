"""Functions of torch.nn.functional in elementary operators, right in every order and under every transform."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

noise = 0.0  # relative size of the rounding to simulate after each step of a normalisation and in `rounded`
least = 1  # how many values a mean must have
_batch_norm, _instance_norm = F.batch_norm, F.instance_norm


def rounded(t, phase=0):
    """t, as if each element had been rounded by up to `noise`; its gradients are rounded too, by other amounts."""
    if not noise:
        return t
    i = torch.arange(t.numel(), dtype=t.dtype)
    value, slope = ((1.7 * i + 0.61 * i * i + 1e15 * noise + phase + k).cos().view(t.shape) for k in (0, 9))
    # A derivative is rounded independently of its function: where terms cancel, their roundings do not.
    return t * (1 + noise * slope) + (t * (noise * (value - slope))).detach()


def normalized(x, dims, eps, centred=True):
    if math.prod(x.shape[d] for d in dims) < least:
        raise ValueError(f"fewer than {least} values to normalise")
    d = rounded(rounded(x, 1) - rounded(x.mean(dims, True), 2), 3) if centred else rounded(x, 1)
    # Twice, so that gradients are rounded before they are added up.
    return rounded(d, 5) * rounded((rounded(d, 6).square().mean(dims, True) + eps).rsqrt(), 4)


def affine(y, w, b, first):
    """y times w plus b; w and b lie along the dimensions of y from `first` on."""

    def along(p):
        return p.view(*p.shape, *[1] * (y.dim() - first - p.dim()))

    y = y if w is None else y * along(w)
    return y if b is None else y + along(b)


def batch_norm(x, mean, var, w=None, b=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return affine(affine(affine(x, None, -mean, 1), (var + eps).rsqrt(), None, 1), w, b, 1)
    if mean is not None:
        _batch_norm(x.detach(), mean, var, None, None, True, momentum, eps)  # moves the running statistics
    return affine(normalized(x, [d for d in range(x.dim()) if d != 1], eps), w, b, 1)


def instance_norm(x, mean=None, var=None, w=None, b=None, use_input_stats=True, momentum=0.1, eps=1e-5):
    if not use_input_stats:
        return batch_norm(x, mean, var, w, b, False, momentum, eps)
    if mean is not None:
        _instance_norm(x.detach(), mean, var, None, None, True, momentum, eps)
    return affine(normalized(x, list(range(2, x.dim())), eps), w, b, 1)


def group_norm(x, groups, w=None, b=None, eps=1e-5):
    return affine(normalized(x.reshape(x.shape[0], groups, -1), [2], eps).reshape(x.shape), w, b, 1)


def layer_norm(x, shape, w=None, b=None, eps=1e-5):
    first = x.dim() - len(shape)
    return affine(normalized(x, list(range(first, x.dim())), eps), w, b, first)


def rms_norm(x, shape, w=None, eps=None):
    first = x.dim() - len(shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return affine(normalized(x, list(range(first, x.dim())), eps, centred=False), w, None, first)


def attention(q, k, v, mask=None, dropout=0, is_causal=False, scale=None, enable_gqa=False):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if enable_gqa else t for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def hardsigmoid(x, inplace=False):
    y, slope = F.relu6(x + 3), torch.tensor(1 / 6, dtype=torch.float32).item()  # PyTorch's slope, in every dtype
    y = y * slope + (y / 6 - y * slope).detach()
    return x.copy_(y) if inplace else y


TWICE = {
    "scaled_dot_product_attention": attention,
    "hardsigmoid": hardsigmoid,
}  # PyTorch has no second derivative of these
ALL = TWICE | {f.__name__: f for f in (batch_norm, instance_norm, group_norm, layer_norm, rms_norm)}
