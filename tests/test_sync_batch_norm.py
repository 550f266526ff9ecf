"""SyncBatchNorm over several processes is BatchNorm over all of their samples, in every derivative."""

import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

import sync_batch_norm_run as run


def normalize(x, w=None, b=None):
    """BatchNorm in operators of which PyTorch gets every derivative right."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    y = centred * (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
    return y if w is None else y * w.view(-1, 1, 1) + b.view(-1, 1, 1)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("case", run.SIZES)
def test_sync_batch_norm(case, affine, tmp_path):
    sizes = run.SIZES[case]
    processes = [
        subprocess.Popen(
            [sys.executable, run.__file__, case, str(affine), str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(sizes))
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]

    x, v, *parameters = run.data(sum(sizes), affine)
    expected = run.derivatives(normalize, x.requires_grad_(), v, [p.requires_grad_() for p in parameters])
    each = 1 + len(parameters)
    for i, e in enumerate(expected):
        # gradients of x are concatenated; those of a parameter are summed, as DistributedDataParallel does
        actual = torch.cat([p[i] for p in parts]) if i % each == 0 else sum(p[i] for p in parts)
        assert (actual - e).norm() <= 1e-9 * (1 + e.norm()), f"order {i // each + 1}, input {i % each}"
        assert e.abs().sum() > 0
