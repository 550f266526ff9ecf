"""More rows and more elements than 32 bits can count, and results that are too large for the caches."""

import pytest
import torch

import robustkern
from robustkern.ops import row_norm, softmax_cross_entropy
from robustkern.reference.batch_norm import batch_norm_double_backward

BEYOND = 2**31


def free_memory(device):
    """Bytes that a test may use."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


@pytest.fixture
def twelve_gigabytes(device, emulated):
    if emulated:
        pytest.skip("too slow in the emulator; its own tests probe the last block of such grids")
    if free_memory(device) < 12e9:
        pytest.skip(f"needs 12 GB of free memory on {device}, there are {free_memory(device) / 1e9:.0f}")


@pytest.mark.usefixtures("twelve_gigabytes")
def test_rows_far_apart(device):
    """Offsets beyond 2^31, in memory of which only the ends are touched."""
    storage = torch.empty(BEYOND + 200, dtype=torch.bfloat16, device=device)
    ends = storage.as_strided((2, 100), (BEYOND + 50, 1))
    ends.copy_(torch.linspace(-1.0, 1.0, 200, device=device).view(2, 100))
    for p in (1.0, 2.0, torch.inf):
        assert torch.equal(row_norm(ends, p, impl="kernel"), row_norm(ends.contiguous(), p, impl="kernel"))
    target = torch.tensor([3, 99], device=device)
    losses = [softmax_cross_entropy(z, target, impl="kernel") for z in (ends, ends.contiguous())]
    assert torch.equal(*losses)


@pytest.mark.slow
@pytest.mark.usefixtures("twelve_gigabytes")
@pytest.mark.parametrize("columns", [2**16, 1000])
def test_more_elements_than_int32_can_count(columns, device):
    """The last rows, whose offsets need more than 31 bits, are those of a small tensor."""
    rows = BEYOND // columns + 3
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    tail = torch.randn(3, columns, device=device).to(torch.bfloat16)
    x[-3:] = tail
    norm = row_norm(x, 2.0, impl="kernel")
    assert not norm[:-3].any()
    expected = row_norm(tail, 2.0, impl="kernel")
    assert torch.equal(norm[-3:], expected)
    grad = torch.ones_like(norm)
    grad_x = torch.ops.robustkern.row_norm_backward(grad, x, norm, None, 1, 2.0, False)
    small = torch.ops.robustkern.row_norm_backward(grad[-3:], tail, expected, None, 1, 2.0, False)
    assert torch.equal(grad_x[-3:], small)
    assert not grad_x[:3].any()


@pytest.mark.slow
@pytest.mark.usefixtures("twelve_gigabytes")
def test_more_logits_than_int32_can_count(device):
    classes = 32_768
    rows = BEYOND // classes + 2
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=device)
    tail = torch.randn(2, classes, device=device).to(torch.bfloat16)
    logits[-2:] = tail
    target = torch.arange(rows, device=device) % classes
    loss, statistics = torch.ops.robustkern.softmax_cross_entropy(logits, target, 0.1, 1.0, -100)
    expected, small = torch.ops.robustkern.softmax_cross_entropy(tail, target[-2:], 0.1, 1.0, -100)
    assert torch.equal(loss[-2:], expected)
    grad = torch.ones_like(loss)
    options = (0.1, 1.0, -100)
    backward = torch.ops.robustkern.softmax_cross_entropy_backward
    whole = backward(grad, logits, statistics, target, *options)[-2:]
    assert torch.equal(whole, backward(grad[-2:], tail, small, target[-2:], *options))


@pytest.mark.usefixtures("not_emulated")
def test_a_million_rows(device):
    logits = torch.randn(1_000_003, 3, device=device)
    target = torch.arange(1_000_003, device=device) % 3
    loss = softmax_cross_entropy(logits, target, impl="kernel")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, reduction="none"))


# On the CPU, results of this many bytes bypass the caches; the length is no multiple of pieces or cache lines.
STREAMED = 13 << 20


def normal(*shape, dtype, device):
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(len(shape)))


def assert_same(whole, parts):
    for i, result in enumerate(whole):
        assert result.any()
        assert torch.equal(result, torch.cat([part[i] for part in parts]))


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_activations_are_what_small_ones_are(dtype, device):
    n = STREAMED // dtype.itemsize + 7
    tensors = [normal(n, dtype=dtype, device=device) for _ in range(3)]
    call = torch.ops.robustkern.activation_double_backward
    parts = [call(*part, "gelu", [], True, True) for part in zip(*(t.split(1000) for t in tensors))]
    assert_same(call(*tensors, "gelu", [], True, True), parts)


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("shape", [(1001, 5), (9, 61, 37)], ids=["rows", "columns"])
def test_large_softmaxes_are_what_small_ones_are(shape, device):
    samples = STREAMED // 4 // torch.Size(shape[1:]).numel() + 1
    tensors = [normal(samples, *shape[1:], dtype=torch.float32, device=device) for _ in range(2)]
    tensors.append(torch.softmax(normal(samples, *shape[1:], dtype=torch.float32, device=device), 1))
    tensors = [t.view(samples, shape[1], -1) for t in tensors]
    call = torch.ops.robustkern.softmax_double_backward
    parts = [call(*part, False, True, True) for part in zip(*(t.split(100) for t in tensors))]
    assert_same(call(*tensors, False, True, True), parts)


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_activations_of_several_cotangents_are_what_small_ones_are(dtype, device):
    n = STREAMED // dtype.itemsize // 3 + 7
    u, g = (normal(3, n, dtype=dtype, device=device) for _ in range(2))
    x = normal(n, dtype=dtype, device=device)
    call = torch.ops.robustkern.activation_double_backward
    whole = call(u, g, x, "gelu", [], True, True)
    splits = (u.split(1000, 1), g.split(1000, 1), x.split(1000))
    parts = [call(u.contiguous(), g.contiguous(), x, "gelu", [], True, True) for u, g, x in zip(*splits)]
    for i, result in enumerate(whole):
        assert result.any()
        assert torch.equal(result, torch.cat([part[i] for part in parts], -1))


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("cotangents", [1, 3])
@pytest.mark.parametrize("features", [10, 400, 1027, 3001])
def test_large_layer_norms_are_what_small_ones_are(features, cotangents, device):
    rows = STREAMED // 4 // features // cotangents + 1
    u, g = (normal(cotangents, rows, features, dtype=torch.float32, device=device) for _ in range(2))
    x = normal(rows, features, dtype=torch.float32, device=device)
    weight = normal(features, dtype=torch.float32, device=device)
    mean, rstd = x.mean(1), x.var(1, correction=0).rsqrt()

    def run(u, g, x, mean, rstd):
        if cotangents == 1:
            u, g = u[0], g[0]
        second = torch.ops.robustkern.layer_norm_double_backward
        gg_grad, grad_x, _ = second(u, None, None, g, x, weight, mean, rstd, True, True, False)
        first, _, _ = torch.ops.robustkern.layer_norm_backward(g, x, weight, mean, rstd, True, False, False)
        return gg_grad, grad_x, first

    whole = run(u, g, x, mean, rstd)
    step = rows // 5 + 1
    splits = (*(t.split(step, 1) for t in (u, g)), *(t.split(step) for t in (x, mean, rstd)))
    parts = [run(*(t.contiguous() for t in part)) for part in zip(*splits)]
    for i, result in enumerate(whole):
        assert result.any()
        assert torch.equal(result, torch.cat([part[i] for part in parts], -2))


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("channels, positions", [(6, 20_001), (40, 1030), (42, 300), (1500, 7), (300, 1)])
def test_large_group_norms_are_what_small_ones_are(channels, positions, channels_last, device):
    samples = STREAMED // 4 // (channels * positions) + 1
    u, g, x = (normal(samples, channels, positions, dtype=torch.float32, device=device) for _ in range(3))
    if channels_last:
        u, g, x = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (u, g, x))
    weight = normal(channels, dtype=torch.float32, device=device)
    grouped = x.reshape(samples, 2, -1)
    mean, rstd = grouped.mean(2), grouped.var(2, correction=0).rsqrt()

    def run(u, g, x, mean, rstd):
        second = torch.ops.robustkern.group_norm_double_backward
        gg_grad, grad_x, _ = second(u, None, None, g, x, weight, mean, rstd, 2, True, True, False)
        first, _, _ = torch.ops.robustkern.group_norm_backward(g, x, weight, mean, rstd, 2, True, False, False)
        return gg_grad, grad_x, first

    step = samples // 3 + 1
    parts = [run(*part) for part in zip(*(t.split(step) for t in (u, g, x, mean, rstd)))]
    assert_same(run(u, g, x, mean, rstd), parts)


@pytest.mark.usefixtures("not_emulated")
@pytest.mark.parametrize("channels, inner", [(3, 20_001), (40, 1030), (40, 300), (300, 1), (7, 1)])
def test_large_batch_norms_are_what_small_ones_are(channels, inner, device):
    """In eval mode, where each sample has its own derivative; in training mode they are compared with the reference."""
    samples = STREAMED // 4 // (channels * inner) + 1
    u, g, x = (normal(samples, channels, inner, dtype=torch.float32, device=device) for _ in range(3))
    a, b, weight, mean = normal(4, channels, dtype=torch.float32, device=device)
    invstd = weight.square() + 0.5
    call = torch.ops.robustkern.batch_norm_double_backward

    def run(*tensors, training, call=call):
        u, g, x, *vectors = tensors
        return call(u, a.to(u), b.to(u), g, x, *vectors, training, True, True, False)[:2]

    step = samples // 3 + 1
    parts = [run(*part, weight, mean, invstd, training=False) for part in zip(*(t.split(step) for t in (u, g, x)))]
    assert_same(run(u, g, x, weight, mean, invstd, training=False), parts)
    mean = x.double().mean((0, 2))
    arguments = [u, g, x, weight, mean, 1 / (x.double().var((0, 2), correction=0) + 1e-5).sqrt()]
    actual = run(*(t.float() for t in arguments), training=True)
    expected = run(*(t.double() for t in arguments), training=True, call=batch_norm_double_backward)
    torch.testing.assert_close(actual, tuple(t.float() for t in expected))


@pytest.mark.parametrize("batch", [7, 1])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"groups": 4, "padding": 1}], ids=str)
def test_convolution_of_large_images_in_parts_of_the_batch(batch, options, not_emulated):
    """A batch is split where its reordered copies would be large, unevenly if need be."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = 171 if batch == 7 else 450
    x, w = draw(batch, 8, size, size).requires_grad_(), draw(8, 8 // options.get("groups", 1), 3, 3).requires_grad_()
    u = draw(*x.shape)

    def second_backward():
        y = torch.nn.functional.conv2d(x, w, **options)
        g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).requires_grad_()
        (grad_x,) = torch.autograd.grad(y, x, g, create_graph=True)
        return torch.autograd.grad(grad_x, [g, w], u)

    expected = second_backward()
    with robustkern.fused_double_backward():
        actual = second_backward()
    torch.testing.assert_close(actual, expected)


def test_several_cotangents_of_a_large_convolution(not_emulated):
    """Batched tensors are not split."""
    x = torch.randn(2, 8, 320, 320, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    with robustkern.fused_double_backward():
        y = torch.nn.functional.conv2d(x, w)
        (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
        cotangents = torch.randn(2, *x.shape, dtype=torch.float64)
        several = torch.func.vmap(lambda u: torch.autograd.grad(grad_x, w, u, retain_graph=True)[0])(cotangents)
        for actual, u in zip(several, cotangents):
            (expected,) = torch.autograd.grad(grad_x, w, u, retain_graph=True)
            torch.testing.assert_close(actual, expected)
