"""First and second derivative of layer normalisation in plain PyTorch."""

from torch import Tensor


def layer_norm_double_backward(
    u: Tensor | None,  # [B, D] or [K, B, D], cotangent of grad_x
    a: Tensor | None,  # [D] of grad_weight
    b: Tensor | None,  # [D] of grad_bias
    grad: Tensor,  # like u, of the output
    x: Tensor,  # [B, D]
    weight: Tensor | None,  # [D]
    mean: Tensor | None,  # [B]
    rstd: Tensor,  # [B]
    need_grad: bool = True,
    need_x: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of L = <u, grad_x> + <a, grad_weight> + <b, grad_bias> in grad, x and weight.

        P(v)        = v - mean(v) - xh mean(v xh),  xh = (x - mean) rstd
        gg_grad     = weight t + a xh + b,  t = rstd P(u)
        grad_x      = -rstd^2 [mean(u P(h)) xh + mean(h xh) P(u) + mean(u xh) P(h)] + rstd P(a grad)
        grad_weight = sum over rows of grad t

    with h = weight grad and the means over a row.  Without `mean` this is RMSNorm: mean(v) drops out of P.  For K
    cotangents u, without a and b, grad_x and grad_weight are sums over them.

    Returns:
        gg_grad, like grad, and grad_x [B, D] in the dtype of x, grad_weight [D] in the dtype of rstd; [0] where not
        needed.

    >>> x, grad = torch.rand(2, 3, 4)
    >>> mean, rstd = x.mean(1), (x.var(1, unbiased=False) + 1e-5).rsqrt()
    >>> gg_grad, _, _ = rk.reference.layer_norm_double_backward(torch.ones(3, 4), None, None, grad, x, None, mean, rstd)
    >>> bool(gg_grad.abs().max() < 1e-4)  # the mean is taken out: constants do not count
    True
    """
    xh = (x if mean is None else x - mean[:, None].to(x.dtype)) * rstd[:, None].to(x.dtype)
    r = rstd[:, None].to(x.dtype)

    def average(v: Tensor) -> Tensor:
        return v.mean(-1, keepdim=True)

    def project(v: Tensor) -> Tensor:
        centred = v if mean is None else v - average(v)
        return centred - xh * average(v * xh)

    def like_x(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.to(x.dtype)

    w, a, b = like_x(weight), like_x(a), like_x(b)
    h = grad if w is None else w * grad
    gg_grad, grad_x, grad_weight = x.new_zeros([1]), x.new_zeros([1]), x.new_zeros([1])
    if u is not None:
        t = r * project(u)
        gg_grad = t if w is None else w * t
        projected = project(h)
        second = average(u * projected) * xh + average(h * xh) * project(u) + average(u * xh) * projected
        grad_x = -r * r * second
        grad_weight = (grad * t).flatten(0, -2).sum(0)
        if grad.dim() > x.dim():
            grad_x = grad_x.sum(0)
    if a is not None:
        gg_grad = gg_grad + a * xh
        grad_x = grad_x + r * project(a * grad)
    if b is not None:
        gg_grad = gg_grad + b
    nothing = x.new_empty([0])
    return (
        gg_grad.expand_as(grad).contiguous() if need_grad else nothing,
        grad_x.expand_as(x).contiguous() if need_x else nothing,
        grad_weight.to(rstd.dtype).expand(x.shape[1]).contiguous() if need_weight else nothing.to(rstd.dtype),
    )


def layer_norm_backward(
    grad: Tensor,  # [B, D] of the output; or [K, B, D], for which there are no weight and bias gradients
    x: Tensor,  # [B, D]
    weight: Tensor | None,  # [D]
    mean: Tensor | None,  # [B]
    rstd: Tensor,  # [B]
    need_x: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""grad_x = rstd P(weight grad), grad_weight = sum over rows of grad xh, grad_bias = sum over rows of grad.

        P(v) = v - mean(v) - xh mean(v xh),  xh = (x - mean) rstd

    with the means over a row.  Without `mean` this is RMSNorm: mean(v) drops out of P.

    Returns:
        grad_x, like grad, in the dtype of x, grad_weight and grad_bias [D] in the dtype of rstd; [0] where not needed.

    >>> x, grad = torch.rand(2, 3, 4)
    >>> mean, rstd = x.mean(1), (x.var(1, unbiased=False) + 1e-5).rsqrt()
    >>> _, _, grad_bias = rk.reference.layer_norm_backward(grad, x, torch.ones(4), mean, rstd)
    >>> torch.allclose(grad_bias, grad.sum(0))
    True
    """
    r = rstd[:, None].to(x.dtype)
    xh = (x if mean is None else x - mean[:, None].to(x.dtype)) * r
    h = grad if weight is None else weight.to(x.dtype) * grad
    centred = h if mean is None else h - h.mean(-1, keepdim=True)
    nothing = x.new_empty([0])
    return (
        r * (centred - xh * (h * xh).mean(-1, keepdim=True)) if need_x else nothing,
        (grad * xh).sum(0).to(rstd.dtype) if need_weight else nothing.to(rstd.dtype),
        grad.sum(0).to(rstd.dtype) if need_bias else nothing.to(rstd.dtype),
    )
