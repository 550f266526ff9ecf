"""Whether a model treats each sample of a batch by itself, as penalties of a sample's gradient take for granted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robustkern._input_gradient import check_graph, input_gradient
from robustkern.ops.row_norm import row_norm


def batch_coupling(model: torch.nn.Module, x: Tensor) -> float:
    r"""||w^T d f_S / d x_not S|| / ||w^T d f_S / d x||: how much the outputs of half a batch, S, depend on the other.

    w holds random signs.  Zero for a model that treats each sample by itself; then gradient and Jacobian norms are
    each sample's own.  BatchNorm in training mode is the usual reason for more.  Penalties remain what their formula
    says, but of a sample's gradient together with the others' part: put BatchNorm into eval mode, or use GroupNorm,
    where that matters.

    Args:
        model: maps x [B, ...] to outputs [B, ...]; its mode is respected, its buffers and the random state of PyTorch
            end as they were.
        x: a batch of at least two samples.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: fewer than two samples, or outputs that do not depend on x.

    Differentiability: none. Determinism: the same on every run.
    """
    if len(x) < 2:
        raise ValueError(f"batch_coupling: at least two samples are needed, got {len(x)}")
    x = x.detach().requires_grad_()
    selected = torch.arange(len(x), device=x.device) % 2 == 0
    with torch.enable_grad(), torch.random.fork_rng(_devices(x)), _unchanged_buffers(model):
        outputs = model(x)
        generator = torch.Generator(x.device).manual_seed(0)
        signs = torch.randint(2, outputs.shape, generator=generator, device=x.device).to(outputs.dtype) * 2 - 1
        check_graph("batch_coupling", "outputs", outputs)
        signs[~selected] = 0
        grad = input_gradient("batch_coupling", "outputs", outputs, x, signs, create_graph=False)
    norms = row_norm(grad, 2.0, squared=True).double()
    total = norms.sum()
    return float((norms[~selected].sum() / total).sqrt()) if total > 0 else 0.0


def _devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []


@contextmanager
def _unchanged_buffers(model: torch.nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
