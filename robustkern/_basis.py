"""Bases of cotangents: a sum over one gives a Jacobian norm exactly."""

from collections.abc import Iterator

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype


def unit_cotangents(outputs: Tensor) -> Iterator[Tensor]:
    """Yields e_j, in the shape of `outputs`, for each of the D outputs of a sample."""
    size = outputs.shape[1:].numel()
    for j in range(size):
        cotangent = torch.zeros_like(outputs, memory_format=torch.contiguous_format)
        cotangent.view(outputs.shape[0], size)[:, j] = 1
        yield cotangent


def basis_cotangents(outputs: Tensor, kind: str) -> Iterator[Tensor]:
    """w_j with sum_j ||J^T w_j||^2 = ||J||_F^2, ||(I - 11^T/C) J||_F^2 or tr(FIM), as `kind` says.

    With w = M v, the matrix M of a kind maps one direction a of each position's C classes to zero: a = 1 / sqrt(C)
    (centred) or sqrt(p) (fisher).  C - 1 orthonormal vectors orthogonal to a are therefore enough:
    q_j = e_j - a_j (a + e_C) / (1 + a_C), rows of the Householder reflection that takes a to -e_C; as a >= 0, nothing
    cancels.  Where M is differentiated, q_j may stay constant: M a = 0 adds nothing to the value or its derivative.

    Args:
        outputs: [B, C] or [B, C, ...]; only "fisher" reads them, and is differentiable in them.
        kind: "plain", "centred" or "fisher".
    """
    batch, classes = outputs.shape[:2]
    if kind == "plain" or classes == 1:
        for cotangent in unit_cotangents(outputs):
            # With one class, centred and fisher are zero: one zero cotangent gives the sum a term.
            yield cotangent if kind == "plain" else torch.zeros_like(cotangent)
            if kind != "plain":
                return
        return
    flat = outputs.reshape(batch, classes, outputs.shape[2:].numel()).to(accumulation_dtype(outputs.dtype))
    root = torch.exp(0.5 * torch.log_softmax(flat, 1)) if kind == "fisher" else torch.full_like(flat, classes**-0.5)
    a = root.detach()
    mirror = (a + torch.eye(classes, device=a.device, dtype=a.dtype)[-1, :, None]) / (1 + a[:, -1:])
    for j in range(classes - 1):
        for s in range(flat.shape[2]):
            q = torch.zeros_like(a)
            q[:, :, s] = -a[:, j : j + 1, s] * mirror[:, :, s]
            q[:, j, s] += 1
            if kind == "fisher":
                q = root * q
                q = q - root.square() * q.sum(1, keepdim=True)
            yield q.to(outputs.dtype).reshape(outputs.shape)
