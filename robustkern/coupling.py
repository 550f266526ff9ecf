"""Whether a model treats each sample of a batch by itself, as penalties on a sample's gradient assume."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robustkern._input_gradient import check_graph, check_tensors, input_gradient
from robustkern.ops.row_norm import row_norm


def batch_coupling(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    r"""sqrt(sum_H ||w^T d f_H / d x_not H||^2 / sum_H ||w^T d f_H / d x||^2): how much samples depend on each other.

    H runs over two random halves of the batch; w are random signs.  The result is zero for a model that treats each
    sample by itself, so that gradient and Jacobian norms are each sample's own.  If it is not, the usual reason is
    BatchNorm in training mode: penalties then include what the other samples contribute to a sample's gradient.  Where
    that matters, put BatchNorm into eval mode or use GroupNorm.  Only half of all pairs of samples are tested: a model
    in which few samples depend on few others can get zero.

    Args:
        model: maps x [B, ...] to outputs [B, ...]; it runs in its current mode, and its buffers and PyTorch's
            random state are restored (except buffers behind a function that is not an `nn.Module`).
        x: a batch of at least two samples, floating point.

    Returns:
        A number from 0 to 1.

    Raises:
        TypeError: x or the outputs are not floating-point tensors.
        ValueError: fewer than two samples, outputs that are not [B, ...], or that do not depend on x.

    Differentiability: none. Determinism: the same on every run.

    >>> x = torch.rand(8, 4)
    >>> rk.batch_coupling(nn.Linear(4, 2), x)
    0.0
    >>> rk.batch_coupling(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), x) > 0
    True
    """
    name = "batch_coupling"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: x must be a floating-point tensor, got {kind}")
    if x.dim() == 0 or len(x) < 2:
        raise ValueError(f"{name}: at least two samples are needed, got {len(x) if x.dim() else 'a number'}")
    x = x.detach().requires_grad_()
    generator = torch.Generator(x.device).manual_seed(0)
    half = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    half[torch.randperm(len(x), generator=generator, device=x.device)[: len(x) // 2]] = True
    with torch.enable_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []), _unchanged_buffers(model):
        outputs = model(x)
        check_tensors(name, x, outputs=outputs)
        if outputs.dim() == 0 or len(outputs) != len(x):
            raise ValueError(f"{name}: outputs must have the {len(x)} rows of x, got shape {list(outputs.shape)}")
        check_graph(name, "outputs", outputs)
        signs = torch.randint(2, outputs.shape, generator=generator, device=x.device).to(outputs.dtype) * 2 - 1
        across = total = 0.0
        for chosen in (half, ~half):
            cotangent = signs.clone()
            cotangent[~chosen] = 0
            grad = input_gradient(name, "outputs", outputs, x, cotangent, create_graph=False)
            squares = row_norm(grad, 2.0).double().square()  # of norms, which neither vanish nor overflow
            across += float(squares[~chosen].sum())
            total += float(squares.sum())
    return (across / total) ** 0.5 if total > 0 else 0.0


@contextmanager
def _unchanged_buffers(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    buffers = model.buffers() if isinstance(model, torch.nn.Module) else ()
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
