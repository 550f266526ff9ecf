"""Where a tensor lies in memory changes nothing but the layout of its gradient."""

import dataclasses
import itertools

import pytest
import torch

from cases import (
    assert_accurate,
    assert_same_bits,
    cotangents,
    over_dtypes,
    over_filled,
    over_small,
    random_like,
    recorded_calls,
    run,
)

OFFSETS = range(16)  # bytes from a 16-byte boundary, the widest load of a CUDA kernel


def displaced(tensor, offset):
    """A copy whose memory begins `offset` bytes past a 16-byte boundary, between NaNs; dense."""
    item = tensor.element_size()
    margin = 64 // item
    buffer = torch.full((tensor.numel() + 2 * margin,), float("nan"), dtype=torch.float64).to(tensor)
    start = next(s for s in range(margin) if (buffer.data_ptr() + s * item) % 16 == offset)
    copy = buffer[start : start + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() % 16 == offset
    return copy


@over_dtypes
@over_small
def test_any_alignment_gives_the_same_bits(case, dtype, device):
    sample = case.sample(device, dtype)
    for call in recorded_calls(sample).values():
        expected = call(**{n: t.contiguous() for n, t in call.tensors.items()})
        for offset in OFFSETS:
            moved = {n: displaced(t, offset) for n, t in call.tensors.items() if offset % t.element_size() == 0}
            assert_same_bits(call(**moved), expected)


def layouts_of(tensor):
    """The same numbers in other layouts."""
    yield (
        "reversed dimensions",
        tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim()))),
    )
    padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=torch.float64).to(tensor)
    padded[..., 1:-2] = tensor
    yield "rows apart", padded[..., 1:-2]
    yield "every second element", torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
    if tensor.dim() == 4:
        yield "channels_last", tensor.contiguous(memory_format=torch.channels_last)
    if tensor.shape[0] > 1:
        yield "flipped twice", tensor.flip(0).flip(0)


@over_small
def test_any_layout_is_as_accurate(case, device):
    sample = case.sample(device, torch.float32)
    grad, u = cotangents(sample)
    x = sample.inputs[0]
    for (_, a), (_, b) in itertools.product(layouts_of(x), layouts_of(u)):
        assert_accurate(sample, grad, b, run(sample, grad, b, x=a))


@over_small
def test_one_row_repeated_without_copies(case, device):
    """Rows with stride zero, as expand makes them."""
    sample = case.sample(device, torch.float32)
    grad, u = cotangents(sample)
    repeated = sample.inputs[0][:1].expand_as(sample.inputs[0])
    assert_accurate(dataclasses.replace(sample, inputs=(repeated, *sample.inputs[1:])), grad, u)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 4, 5)], ids=str)
def test_gradients_of_row_norm_are_laid_out_like_the_input(shape, device):
    from robustkern.ops import row_norm

    x = torch.randn(shape, device=device)
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        leaf = layout.detach().requires_grad_()
        (grad_x,) = torch.autograd.grad(row_norm(leaf, impl="kernel").sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad_x, leaf, random_like(grad_x, 3))
        assert grad_x.stride() == layout.stride()
        assert second.stride() == layout.stride()


@over_filled
def test_values_are_contiguous(case, device):
    assert case.sample(device, torch.float32)(impl="kernel").is_contiguous()
