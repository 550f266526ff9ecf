"""The input gradient of a first layer on the CPU: one to four input channels, patch embeddings included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustkern as rk
from robustkern._dtypes import DTYPES
from robustkern.testing import assert_as_accurate_as_reference

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

# (x, weight, stride, padding)
LAYERS = {
    "3x3": ((3, 3, 9, 7), (5, 3, 3, 3), 1, 1),
    "one channel, stride 2": ((2, 1, 28, 27), (17, 1, 3, 3), 2, 1),
    "7x7, stride 2": ((2, 3, 37, 50), (16, 3, 7, 7), 2, 3),
    "more rows than a band has": ((1, 2, 150, 5), (3, 2, 3, 2), (1, 2), 1),
    "more than a block": ((1, 4, 40, 44), (130, 4, 5, 5), 1, 0),
    "stride beyond the kernel": ((2, 2, 14, 13), (9, 2, 2, 2), (3, 5), (1, 0)),
    "padding beyond the kernel": ((2, 1, 4, 5), (2, 1, 3, 3), 2, 4),
    "a row": ((1, 4, 1, 40), (3, 4, 1, 6), (1, 2), (0, 2)),
    "patches": ((3, 3, 16, 24), (33, 3, 4, 4), 4, 0),
    "patches with a rest": ((2, 4, 11, 15), (8, 4, 2, 3), (2, 3), 0),
    "patches of two axes": ((2, 3, 8, 20), (4, 3, 1, 5), (1, 5), 0),
    "wide patches": ((1, 3, 32, 48), (40, 3, 16, 16), 16, 0),
}
over_layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=[name.replace(" ", "_") for name in LAYERS])

# What another kernel computes: these keep PyTorch's bits.  (x, weight, options)
OTHERS = {
    "five channels": ((2, 5, 8, 8), (4, 5, 3, 3), {"padding": 1}),
    "dilation": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilation": 2}),
    "groups": ((2, 4, 8, 8), (6, 2, 3, 3), {"groups": 2}),
    "1x1": ((2, 3, 8, 8), (6, 3, 1, 1), {}),
    "patches of many channels": ((2, 6, 8, 8), (6, 6, 2, 2), {"stride": 2}),
}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def draw(layer, dtype: torch.dtype = torch.float64, layout=torch.contiguous_format) -> tuple[Tensor, ...]:
    """g, x and the weight."""
    (x_shape, weight_shape, *_), generator = layer, torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (x_shape, weight_shape))
    y = torch.nn.functional.conv2d(x, w, None, *layer[2:])
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype).contiguous(memory_format=layout) for t in (g, x, w))


def backward(g: Tensor, x: Tensor, w: Tensor, layer, mask=(True, False, False)) -> list[Tensor]:
    stride, padding = map(pair, layer[2:])
    return torch.ops.aten.convolution_backward(g, x, w, [len(w)], stride, padding, (1, 1), False, (0, 0), 1, mask)


def input_gradient(*arguments) -> Tensor:
    with rk.fused_double_backward():
        return backward(*arguments)[0]


def operators(run) -> set[str]:
    """What PyTorch ran; its own kernel for float64 is an operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.name for event in profile.events()}


STOCK = "aten::_slow_conv2d_backward"


@over_layouts
@over_dtypes
@over_layers
def test_as_accurate_as_pytorch(layer, dtype, layout):
    g, x, w = draw(layer, dtype, layout)
    exact = backward(g.double(), x.double(), w.double(), layer)[0]
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    eager = backward(*(t.to(eager_dtype) for t in (g, x, w)), layer)[0]
    actual = input_gradient(g, x, w, layer)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=layout)
    assert_as_accurate_as_reference(actual, eager, exact)


@over_layers
def test_served(layer):
    """By no kernel of PyTorch's, while the switch is on."""
    g, x, w = draw(layer)
    assert STOCK in operators(lambda: backward(g, x, w, layer))
    assert STOCK not in operators(lambda: input_gradient(g, x, w, layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_layers
def test_layouts_of_g_do_not_matter(layer, dtype):
    g, x, w = draw(layer, dtype)
    expected = input_gradient(g, x, w, layer)
    gapped = torch.stack([g, g + 1], -1)[..., 0]
    for other in (
        g.contiguous(memory_format=torch.channels_last),
        gapped,
        g.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(input_gradient(other, x, w, layer), expected)
    assert torch.equal(input_gradient(g, x, w.contiguous(memory_format=torch.channels_last), layer), expected)


@over_layers
def test_threads_and_batches_do_not_matter(layer):
    (_, channels, *size), *rest = layer
    wide = ((9, channels, *size), *rest)
    g, x, w = draw(wide, torch.float32)
    expected = torch.cat([input_gradient(g[i : i + 1], x[i : i + 1], w, wide) for i in range(9)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(input_gradient(g, x, w, wide), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_other_gradients_are_pytorchs():
    layer = LAYERS["3x3"]
    arguments = draw(layer)
    with rk.fused_double_backward():
        actual = backward(*arguments, layer, (True, True, True))
    expected = backward(*arguments, layer, (True, True, True))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize(("x", "w", "options"), OTHERS.values(), ids=[name.replace(" ", "_") for name in OTHERS])
def test_others_are_pytorchs(x, w, options):
    x, w = torch.randn(x, requires_grad=True), torch.randn(w)
    y = torch.nn.functional.conv2d(x, w, **options)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g, retain_graph=True)
    with rk.fused_double_backward():
        assert torch.equal(torch.autograd.grad(y, x, g)[0], expected)


def test_transposed_convolutions_are_pytorchs():
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(3, 4, 3, 3)
    y = torch.nn.functional.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    with rk.fused_double_backward():
        assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], expected)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 8)], ids=str)
def test_nothing_to_add_up(shape):
    """No image, or an output of no channels, which the operator allows."""
    x, outs = torch.randn(shape), 4 if not shape[0] else 0
    g, w = torch.randn(shape[0], outs, 8, 8), torch.randn(outs, 3, 3, 3)
    actual = input_gradient(g, x, w, (None, None, 1, 1))
    assert torch.equal(actual, torch.zeros_like(x))


def test_what_is_not_finite_stays_where_it_reaches():
    layer = LAYERS["7x7, stride 2"]
    g, x, w = draw(layer, torch.float32)
    g[0, 3, 5, 6], g[1, 0, 0, 0] = float("nan"), float("inf")
    expected = backward(g, x, w, layer)[0]
    torch.testing.assert_close(input_gradient(g, x, w, layer), expected, equal_nan=True)


@pytest.mark.parametrize(
    "attack", [rk.attacks.FGSM(0.1), rk.attacks.APGD(0.1, steps=2)], ids=lambda a: type(a).__name__
)
def test_attacks_take_it_by_themselves(attack):
    """Without install(), which they leave as it is."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x, y = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5) % 3
    assert STOCK not in operators(lambda: attack(model, x, y))
    leaf = x.clone().requires_grad_()
    assert STOCK in operators(lambda: model(leaf).sum().backward())


def test_transforms_and_counters_see_pytorchs():
    from torch.utils.flop_counter import FlopCounterMode

    layer = LAYERS["3x3"]
    g, x, w = draw(layer)
    with rk.fused_double_backward():
        with FlopCounterMode(display=False) as counter:
            backward(g, x, w, layer)
        batched = torch.func.vmap(lambda v: backward(v, x, w, layer)[0])(torch.stack([g, 2 * g]))
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(batched[1], 2 * backward(g, x, w, layer)[0])
