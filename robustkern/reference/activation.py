"""Second derivatives of activations in plain PyTorch."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Slopes = tuple[Tensor, Tensor]  # f'(x), f''(x)


def activation_double_backward(
    u: Tensor,  # like x, or [K, *x.shape]
    grad: Tensor,  # like u
    x: Tensor,
    function: str,
    parameters: Sequence[float],
    need_grad: bool = True,
    need_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """gg_grad = f'(x) u and grad_x = f''(x) u grad, summed over the K cotangents where there are several.

    Args:
        u: cotangent of the first backward's grad_x = f'(x) grad.
        grad: cotangent of the activation's result.
        x: input of the activation; for "tanh", "sigmoid", and "elu" with is_result the result y, in which case f'(x) is
            the function s(y), and s'(y) stands for f''(x).
        function: "gelu", "gelu_tanh", "silu", "mish", "softplus", "elu", "hardswish", "tanh" or
            "sigmoid".
        parameters: (beta, threshold) of softplus; (alpha, scale, input_scale, is_result) of elu; else empty.
        need_grad: whether to compute gg_grad; it is empty if not.
        need_x: the same for grad_x.

    >>> one = torch.ones(1)
    >>> gg_grad, grad_x = rk.reference.activation_double_backward(one, one, torch.zeros(1), "silu", ())
    >>> gg_grad.item(), grad_x.item()  # f'(0), f''(0)
    (0.5, 0.5)
    """
    slope, bend = _SLOPES[function](x, *parameters)
    product = u * grad
    if u.dim() > x.dim():
        product = product.sum(0)

    def times(factor: Tensor, t: Tensor) -> Tensor:
        """factor * t; where hardswish is flat, zero whatever t is, as in PyTorch."""
        return torch.where(factor == 0, torch.zeros_like(t), factor * t) if function == "hardswish" else factor * t

    return times(slope, u) if need_grad else x.new_empty([0]), times(bend, product) if need_x else x.new_empty([0])


def _gelu(x: Tensor) -> Slopes:
    h = x.clamp(-40, 40)  # beyond, the density is zero, and squares may overflow
    density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + h * density, density * (2 - h * h)


def _gelu_tanh(x: Tensor) -> Slopes:
    h, root = x.clamp(-25, 25), math.sqrt(2 / math.pi)
    v = root * (h + 0.044715 * h**3)
    slope, bend = root * (1 + 0.134145 * h * h), root * 0.26829 * h  # of v
    t, sech2 = torch.tanh(v), _sech2(v)
    return 0.5 * (1 + t) + 0.5 * h * sech2 * slope, sech2 * (slope + 0.5 * h * (bend - 2 * t * slope * slope))


def _sech2(v: Tensor) -> Tensor:
    """1 - tanh(v)^2, to full relative accuracy."""
    return 4 * torch.sigmoid(2 * v) * torch.sigmoid(-2 * v)


def _silu(x: Tensor) -> Slopes:
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return s * (1 + x * rest), s * rest * (2 + x * (rest - s))


def _mish(x: Tensor) -> Slopes:
    v, s = torch.nn.functional.softplus(x), torch.sigmoid(x)
    t, slope = torch.tanh(v), _sech2(v) * s
    return t + x * slope, slope * (2 + x.clamp(max=1000) * (1 - s - 2 * t * s))  # 2 x may overflow


def _softplus(x: Tensor, beta: float, threshold: float) -> Slopes:
    z = beta * x
    s = torch.sigmoid(z)
    bend = beta * s * torch.sigmoid(-z)
    return torch.where(z > threshold, torch.ones_like(s), s), torch.where(z >= threshold, torch.zeros_like(s), bend)


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float, is_result: float) -> Slopes:
    if is_result:  # y = scale alpha (exp(input_scale x) - 1)
        slope, bend = input_scale * (x + alpha * scale), torch.full_like(x, input_scale)
    else:
        slope = input_scale * alpha * scale * torch.exp(input_scale * x.clamp(max=0))
        bend = input_scale * slope
    return torch.where(x <= 0, slope, torch.full_like(x, scale)), torch.where(x < 0, bend, torch.zeros_like(x))


def _hardswish(x: Tensor) -> Slopes:
    bend = torch.where(x.abs() < 3, torch.full_like(x, 1 / 3), torch.zeros_like(x))
    return torch.where(x.abs() < 3, x / 3 + 0.5, torch.where(x <= -3, torch.zeros_like(x), torch.ones_like(x))), bend


def _tanh(y: Tensor) -> Slopes:
    return 1 - y * y, -2 * y


def _sigmoid(y: Tensor) -> Slopes:
    return y * (1 - y), 1 - 2 * y


_SLOPES: dict[str, Callable[..., Slopes]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": _mish,
    "softplus": _softplus,
    "elu": _elu,
    "hardswish": _hardswish,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
}
