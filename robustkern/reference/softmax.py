"""Second derivatives of softmax and log_softmax in plain PyTorch."""

from torch import Tensor


def softmax_double_backward(
    u: Tensor,  # [B, C, S]
    grad: Tensor,  # [B, C, S]
    output: Tensor,  # [B, C, S]
    log: bool,
    need_grad: bool = True,
    need_output: bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax: gg_grad = p (u - <p, u>), grad_output = u (g - <p, g>) - g <p, u>, with g = grad.

    log_softmax: gg_grad = u - <p, u>, grad_output = -p u sum(g).

    Args:
        u: cotangent of the first backward's grad_x.
        grad: cotangent of the output.
        output: p, or log p if `log`, normalised over its middle dimension, as are all sums.
        log: whether to differentiate log_softmax instead of softmax.
        need_grad: whether to compute gg_grad; it is empty if not.
        need_output: the same for grad_output.

    >>> p = torch.tensor([[0.5, 0.5]])
    >>> gg_grad, _ = rk.reference.softmax_double_backward(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2), p, False)
    >>> gg_grad.tolist()
    [[0.25, -0.25]]
    """
    p = output.exp() if log else output
    mean_u = (p * u).sum(1, keepdim=True)
    nothing = output.new_empty([0])
    if log:
        gg_grad, grad_output = u - mean_u, -grad.sum(1, keepdim=True) * p * u
    else:
        mean_g = (p * grad).sum(1, keepdim=True)
        gg_grad, grad_output = p * (u - mean_u), u * (grad - mean_g) - grad * mean_u
    return gg_grad if need_grad else nothing, grad_output if need_output else nothing
