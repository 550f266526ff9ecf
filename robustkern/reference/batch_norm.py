"""The second derivative of batch normalisation in plain PyTorch."""

from torch import Tensor


def batch_norm_double_backward(
    u: Tensor | None,  # [N, C, S] or [K, N, C, S]
    a: Tensor | None,  # [C]
    b: Tensor | None,  # [C]
    grad: Tensor,  # like u
    x: Tensor,  # [N, C, S]
    weight: Tensor | None,  # [C]
    mean: Tensor,  # [C]
    invstd: Tensor,  # [C]
    training: bool,
    need_grad: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of L = <u, grad_x> + <a, grad_weight> + <b, grad_bias> in grad, x and weight.

    With xh = (x - mean) r, P(v) = v - mean(v) - xh mean(v xh) and K = sum u P(g), over the M elements of a channel:

        gg_grad = w r P(u) + a xh + b
        grad_x = -(w r^2 / M) (K xh + sum(g xh) P(u) + sum(u xh) P(g)) + a r P(g)
        grad_weight = r K

    and in evaluation mode, where mean and r are constants, gg_grad = w r u + a xh + b, grad_x = a r g and
    grad_weight = r sum u g.  For several cotangents u, without a and b, grad_x and grad_weight are sums.

    w r P is symmetric: with grad in the place of u, gg_grad is the grad_x of the first backward.

    Args:
        u: the cotangent of grad_x; None for zero, as for the next two.
        a: the cotangent of grad_weight.
        b: the cotangent of grad_bias.
        grad: g, the gradient that the first backward was given.
        x: the input; any floating-point dtype.
        weight: w, ones if None.
        mean: of each channel over the batch, or the running mean in evaluation mode.
        invstd: r = (var + eps)^(-1/2), likewise.
        training: whether mean and invstd are those of x.
        need_grad: whether to compute the first result; it is empty if not.
        need_x: the same for the second.
        need_weight: the same for the third.

    Returns:
        gg_grad like grad, grad_x like x, grad_weight [C] in the dtype of mean.

    Differentiability: any order.  Source: Ioffe and Szegedy, "Batch normalization", 2015, differentiated twice.

    >>> x, u, grad = torch.rand(3, 4, 2, 5)
    >>> mean, invstd = x.mean((0, 2)), (x.var((0, 2), unbiased=False) + 1e-5).rsqrt()
    >>> results = rk.reference.batch_norm_double_backward(
    ...     u, None, None, grad, x, torch.ones(2), mean, invstd, True, True, True, True
    ... )
    >>> [result.shape for result in results]
    [torch.Size([4, 2, 5]), torch.Size([4, 2, 5]), torch.Size([2])]
    """

    def channels(v: Tensor) -> Tensor:
        return v.to(x.dtype).view(1, -1, 1)

    count = x.shape[0] * x.shape[2]
    r = channels(invstd)
    w, a, b = (None if v is None else channels(v) for v in (weight, a, b))
    scale = r if w is None else w * r
    xh = (x - channels(mean)) * r
    u = x.new_zeros(()).expand_as(grad) if u is None else u

    def total(v: Tensor) -> Tensor:
        return v.sum((-3, -1), keepdim=True)

    def project(v: Tensor) -> Tensor:
        return v - total(v) / count - xh * (total(v * xh) / count) if training else v

    projected = project(u)
    k = total(grad * projected)
    gg_grad = scale * projected
    if a is not None:
        gg_grad = gg_grad + a * xh
    if b is not None:
        gg_grad = gg_grad + b
    if training:
        grad_x = -(scale * r / count) * (k * xh + total(grad * xh) * projected + total(u * xh) * project(grad))
        grad_x = grad_x if a is None else grad_x + a * r * project(grad)
    else:
        grad_x = x.new_zeros(x.shape) if a is None else a * r * grad
    grad_weight = r * k
    if grad.dim() > x.dim():
        grad_weight = grad_weight.sum(0)
        grad_x = grad_x.sum(0) if training else grad_x
    grad_weight = grad_weight.flatten().to(mean.dtype)
    empty = x.new_empty([0])
    return (
        gg_grad if need_grad else empty,
        grad_x if need_x else empty,
        grad_weight if need_weight else empty.to(mean.dtype),
    )
