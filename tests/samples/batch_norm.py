"""Sample calls of the derivatives of batch_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustkern._dtypes import accumulation_dtype
from tests.samples import DerivativeSample, make_tensor


def double_backward_samples(device: str, dtype: torch.dtype) -> Iterator[DerivativeSample]:
    make = make_tensor(device, dtype)
    wide = make_tensor(device, accumulation_dtype(dtype))

    def sample(
        name: str,
        *shape: int,
        training: bool = True,
        affine: bool = True,
        u: bool = True,
        a: bool = False,
        b: bool = False,
        need: tuple[bool, bool, bool] = (True, True, True),
        strided: bool = False,
        zero: tuple[int, ...] = (),
        cotangents: int | None = None,
    ) -> DerivativeSample:
        def image(*several: int) -> Tensor:
            return make(*several, *shape[:2], 2 * shape[2])[..., ::2] if strided else make(*several, *shape)

        several = () if cotangents is None else (cotangents,)
        channels, x = shape[1], 2.0 * image() + 0.5
        exact = x.double() if x.numel() else x.new_ones((1, channels, 2), dtype=torch.float64)
        mean, var = exact.mean((0, 2)), exact.var((0, 2), correction=0)
        accumulation = accumulation_dtype(dtype)
        return DerivativeSample(
            name,
            {
                "u": image(*several) if u else None,
                "a": wide(channels) if a else None,
                "b": wide(channels) if b else None,
                "grad": image(*several),
                "x": x,
                "weight": wide(channels) + 2.0 if affine else None,
                "mean": mean.to(accumulation),
                "invstd": (var + 1e-5).rsqrt().to(accumulation),
                "training": training,
                "need_grad": need[0],
                "need_x": need[1],
                "need_weight": need[2],
            },
            zero,
        )

    yield sample("images", 4, 5, 12)
    yield sample("channels innermost", 40, 6, 1)
    yield sample("a whole vector of channels", 33, 32, 1)
    yield sample("every cotangent", 4, 5, 12, a=True, b=True)
    yield sample("every cotangent, channels innermost", 40, 19, 1, a=True, b=True)
    yield sample("weight's cotangent alone", 4, 5, 12, u=False, a=True, zero=(2,))
    yield sample("no weight", 4, 5, 12, affine=False, need=(True, True, False))
    yield sample("gradient of grad alone", 4, 5, 12, need=(True, False, False))
    yield sample("gradient of x alone", 40, 6, 1, need=(False, True, False))
    yield sample("gradient of weight alone", 4, 5, 12, need=(False, False, True))
    yield sample("fixed statistics", 4, 5, 12, training=False, need=(True, False, True))
    yield sample("fixed statistics, channels innermost", 40, 19, 1, training=False, need=(True, False, True))
    yield sample("fixed statistics, every cotangent", 4, 5, 12, training=False, a=True, b=True)
    yield sample("fixed statistics, channels innermost, every cotangent", 40, 6, 1, training=False, a=True, b=True)
    yield sample("one image, three channels", 1, 3, 20000)
    yield sample("many small images", 300, 16, 7)
    yield sample("large images", 3, 2, 1500)
    yield sample("vectors and a rest, gradient of grad alone", 3, 2, 45, need=(True, False, False))
    yield sample("vectors and a rest, gradient of x alone", 3, 2, 45, need=(False, True, False))
    yield sample("vectors and a rest, fixed statistics", 3, 2, 45, training=False, need=(True, False, True))
    yield sample("many rows", 3000, 40, 1)
    yield sample("strided", 4, 5, 12, strided=True)
    yield sample("empty batch", 0, 5, 12, zero=(2,))
    for shape in ((4, 5, 12), (40, 6, 1), (3000, 40, 1), (1, 3, 20000), (300, 16, 7), (3, 2, 1500)):
        yield sample(f"3 cotangents, {'x'.join(map(str, shape))}", *shape, cotangents=3)
    yield sample("3 cotangents, strided", 4, 5, 12, cotangents=3, strided=True)
    for only in range(3):
        need = (only == 0, only == 1, only == 2)
        for shape in ((5, 18, 12), (40, 19, 1)):
            title = f"2 cotangents, {('grad', 'x', 'weight')[only]} alone, {'x'.join(map(str, shape))}"
            yield sample(title, *shape, cotangents=2, need=need)
    for shape in ((4, 5, 12), (40, 19, 1)):
        title = f"2 cotangents, fixed statistics, {'x'.join(map(str, shape))}"
        yield sample(title, *shape, cotangents=2, training=False, zero=(1,))
    yield sample("1 cotangent", 4, 5, 12, cotangents=1)
    yield sample("no cotangents", 4, 5, 12, cotangents=0, zero=(1, 2))
    yield sample("3 cotangents, empty batch", 0, 5, 12, cotangents=3, zero=(2,))
