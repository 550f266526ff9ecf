"""First and second derivative of group normalisation in plain PyTorch."""

import torch
from torch import Tensor


def group_norm_double_backward(
    u: Tensor | None,  # [N, C, S] cotangent of grad_x
    a: Tensor | None,  # [C] of grad_weight
    b: Tensor | None,  # [C] of grad_bias
    grad: Tensor,  # [N, C, S] of the output
    x: Tensor,  # [N, C, S]
    weight: Tensor | None,  # [C]
    mean: Tensor,  # [N, groups]
    rstd: Tensor,  # [N, groups]
    groups: int,
    need_grad: bool = True,
    need_x: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of L = <u, grad_x> + <a, grad_weight> + <b, grad_bias> in grad, x and weight.

        P(v)        = v - mean(v) - xh mean(v xh),  xh = (x - mean) rstd
        gg_grad     = weight t + a xh + b,  t = rstd P(u)
        grad_x      = -rstd^2 [mean(u P(h)) xh + mean(h xh) P(u) + mean(u xh) P(h)] + rstd P(a grad)
        grad_weight = sum over samples and positions of grad t

    with h = weight grad and the means over one group of one sample.

    Returns:
        gg_grad and grad_x like x, grad_weight [C] in the dtype of rstd; [0] where not needed.

    >>> x, u, grad = torch.rand(3, 2, 4, 5)
    >>> mean, rstd = x.mean((1, 2))[:, None], (x.flatten(1).var(1, unbiased=False) + 1e-5).rsqrt()[:, None]
    >>> results = rk.reference.group_norm_double_backward(u, None, None, grad, x, torch.ones(4), mean, rstd, 1)
    >>> [result.shape for result in results]
    [torch.Size([2, 4, 5]), torch.Size([2, 4, 5]), torch.Size([4])]
    """
    n, c, s = x.shape
    shape = (n, groups, c // groups, s)

    def grouped(v: Tensor) -> Tensor:
        return v.reshape(shape)

    def per_channel(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.to(x.dtype).view(1, groups, c // groups, 1)

    def average(v: Tensor) -> Tensor:
        return v.mean((2, 3), keepdim=True)

    r = rstd.to(x.dtype)[:, :, None, None]
    xh = (grouped(x) - mean.to(x.dtype)[:, :, None, None]) * r

    def project(v: Tensor) -> Tensor:
        return v - average(v) - xh * average(v * xh)

    w, a, b = per_channel(weight), per_channel(a), per_channel(b)
    g = grouped(grad)
    h = g if w is None else w * g
    gg_grad, grad_x, grad_weight = torch.zeros_like(xh), torch.zeros_like(xh), x.new_zeros(c)
    if u is not None:
        u = grouped(u)
        t = r * project(u)
        gg_grad = t if w is None else w * t
        projected = project(h)
        grad_x = -r * r * (average(u * projected) * xh + average(h * xh) * project(u) + average(u * xh) * projected)
        grad_weight = (g * t).sum((0, 3)).reshape(c)
    if a is not None:
        gg_grad = gg_grad + a * xh
        grad_x = grad_x + r * project(a * g)
    if b is not None:
        gg_grad = gg_grad + b

    nothing = x.new_empty([0])
    return (
        torch.empty_like(x).copy_(gg_grad.view(n, c, s)) if need_grad else nothing,
        torch.empty_like(x).copy_(grad_x.view(n, c, s)) if need_x else nothing,
        grad_weight.to(rstd.dtype) if need_weight else nothing.to(rstd.dtype),
    )


def group_norm_backward(
    grad: Tensor,  # [N, C, S] of the output
    x: Tensor,  # [N, C, S]
    weight: Tensor | None,  # [C]
    mean: Tensor,  # [N, groups]
    rstd: Tensor,  # [N, groups]
    groups: int,
    need_x: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""grad_x = rstd P(weight grad), grad_weight = sum of grad xh, grad_bias = sum of grad.

        P(v) = v - mean(v) - xh mean(v xh),  xh = (x - mean) rstd

    with the means over one group of one sample, the sums over samples and positions.

    Returns:
        grad_x like x, grad_weight and grad_bias [C] in the dtype of rstd; [0] where not needed.

    >>> x, grad = torch.rand(2, 3, 4, 5)
    >>> mean, rstd = x.mean((1, 2))[:, None], (x.flatten(1).var(1, unbiased=False) + 1e-5).rsqrt()[:, None]
    >>> _, _, grad_bias = rk.reference.group_norm_backward(grad, x, torch.ones(4), mean, rstd, 1)
    >>> torch.allclose(grad_bias, grad.sum((0, 2)))
    True
    """
    n, c, s = x.shape
    shape = (n, groups, c // groups, s)
    r = rstd.to(x.dtype)[:, :, None, None]
    xh = (x.reshape(shape) - mean.to(x.dtype)[:, :, None, None]) * r
    g = grad.reshape(shape)
    h = g if weight is None else weight.to(x.dtype).view(1, groups, c // groups, 1) * g

    def average(v: Tensor) -> Tensor:
        return v.mean((2, 3), keepdim=True)

    nothing = x.new_empty([0])
    grad_x = r * (h - average(h) - xh * average(h * xh))
    return (
        torch.empty_like(x).copy_(grad_x.view(n, c, s)) if need_x else nothing,
        (g * xh).sum((0, 3)).reshape(c).to(rstd.dtype) if need_weight else nothing.to(rstd.dtype),
        g.sum((0, 3)).reshape(c).to(rstd.dtype) if need_bias else nothing.to(rstd.dtype),
    )
