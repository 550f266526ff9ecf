"""What a second backward holds besides its arguments, in tensors like the largest of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import robustkern as rk

LOSSES = {
    "PyTorch's": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "PyTorch's, smoothed": lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1),
    "robustkern's": rk.ops.softmax_cross_entropy,
}


def peak_bytes(run) -> int:
    """The most that is allocated at a time while it runs, beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("loss", LOSSES.values(), ids=[name.replace(" ", "_") for name in LOSSES])
def test_cross_entropy_of_many_classes(loss, not_emulated):
    """Two matrices of probabilities at most: of 50,000 classes each is large."""
    z, y = torch.randn(8, 50_000, requires_grad=True), torch.arange(8)
    with rk.fused_double_backward():
        (grad,) = torch.autograd.grad(loss(z, y).sum(), z, create_graph=True)
        u = torch.randn_like(z)
        peak = peak_bytes(lambda: torch.autograd.grad(grad, z, u))
    assert z.nbytes <= peak <= 2.1 * z.nbytes
