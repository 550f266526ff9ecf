"""Times the second backward of PyTorch's operators, stock and installed: python -m benchmarks.bench_double_backward.

One row per case: the second autograd.grad of a graph built by PyTorch and of one built under robustkern.install(), and
the rate at which the latter moves the fewest bytes that it can: x, the gradient and its cotangent read once, the
gradients of the gradient and of x written once; three tensors more for functions whose derivative in x passes through
PyTorch's first backward once more, and for sums over all of memory before the first result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import robustkern as rk

from . import harness


@dataclass(frozen=True)
class Spec:
    """One function of x and, if it has them, weight and bias of `features` elements."""

    op: str  # the operator of robustkern that serves it
    name: str
    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    features: int = 0
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    more: int = 0  # tensors like x that must be moved besides

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.name}, {shape} {str(self.dtype).removeprefix('torch.')}{layout}"


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 8, weight, bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def _attention(x: Tensor) -> Tensor:
    q, k, v = x.unbind(2)
    return F.scaled_dot_product_attention(q, k, v)


def specs(size: str) -> list[Spec]:
    """The cases, "tiny" for tests."""
    tiny = size == "tiny"
    image = (2, 8, 4, 4) if tiny else (64, 64, 32, 32)
    rows = (6, 16) if tiny else (16384, 384)
    flat = (64,) if tiny else (1 << 22,)
    heads = (1, 2, 3, 5, 8) if tiny else (16, 6, 3, 197, 64)
    bf16, channels, width = torch.bfloat16, image[1], rows[1]
    batch, group, layer = ("batch_norm_double_backward", "group_norm_double_backward", "layer_norm_double_backward")
    activation, softmax = "activation_double_backward", "softmax_double_backward"
    return [
        Spec(batch, "BatchNorm2d", _batch_norm, image, channels),
        Spec(batch, "BatchNorm2d", _batch_norm, image, channels, True, more=3),
        Spec(batch, "BatchNorm2d", _batch_norm, image, channels, dtype=bf16),
        Spec(group, "GroupNorm", _group_norm, image, channels),
        Spec(group, "GroupNorm", _group_norm, image, channels, True),
        Spec(layer, "LayerNorm", _layer_norm, rows, width),
        Spec(layer, "LayerNorm", _layer_norm, rows, width, dtype=bf16),
        Spec(layer, "RMSNorm", _rms_norm, rows, width),
        Spec(activation, "GELU", F.gelu, flat),
        Spec(activation, "GELU (tanh)", lambda x: F.gelu(x, approximate="tanh"), flat),
        Spec(activation, "SiLU", F.silu, flat),
        Spec(activation, "SiLU", F.silu, flat, dtype=bf16),
        Spec(activation, "Mish", F.mish, flat),
        Spec(activation, "Softplus", F.softplus, flat),
        Spec(activation, "Tanh", torch.tanh, flat, more=3),
        Spec(softmax, "log_softmax", lambda x: F.log_softmax(x, -1), rows, more=3),
        Spec("attention_double_backward", "attention", _attention, heads),
    ]


class Case:
    """The tensors of a spec, and its second backward."""

    def __init__(self, spec: Spec, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...], dtype: torch.dtype = spec.dtype) -> Tensor:
            t = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
            return t.contiguous(memory_format=torch.channels_last) if spec.channels_last and t.dim() == 4 else t

        self.spec = spec
        self.x = normal(spec.shape).requires_grad_()
        self.parameters = tuple(normal((spec.features,)).requires_grad_() for _ in range(2)) if spec.features else ()
        with torch.no_grad():
            value = spec.function(self.x, *self.parameters)
        self.grad = normal(tuple(value.shape)).requires_grad_()
        self.u = normal(spec.shape)
        self.bytes = (3 + spec.more) * self.x.nbytes + 2 * self.grad.nbytes

    def work(self) -> harness.Work:
        """The second backward of a graph built now."""
        value = self.spec.function(self.x, *self.parameters)
        (grad_x,) = torch.autograd.grad(value, self.x, self.grad, create_graph=True)
        wanted = (self.grad, self.x, *self.parameters)
        return lambda: torch.autograd.grad(grad_x, wanted, self.u, retain_graph=True, allow_unused=True)


def measure(spec: Spec, device: str, interleaved: harness.Interleaved, copy: harness.Copy, seconds: float) -> dict:
    """One row: milliseconds of both, and the share of the copy bandwidth of the same rounds."""
    case = Case(spec, device)
    row: dict = {"op": spec.op, "case": str(spec), "bytes": case.bytes}
    with rk.fused_double_backward():
        work = {"installed": case.work(), "copy": copy}
    try:
        stock = case.work()
        for mine, theirs in zip(work["installed"](), stock(), strict=True):  # type: ignore[call-overload]
            if theirs is None or mine is None:
                continue
            error = float((mine.double() - theirs.double()).norm() / (theirs.double().norm() + 1e-30))
            assert error < torch.finfo(spec.dtype).eps ** 0.5, f"{spec}: {error:.2g} from stock's result"
        work["stock"] = stock
    except RuntimeError as reason:
        row["stock_reason"] = str(reason).split("\n")[0]
    timings = interleaved(work, seconds=seconds)
    rate = case.bytes / timings["installed"].ms * 1e-6
    copied = copy.gb_per_s(timings["copy"])
    row["stock_ms"] = round(timings["stock"].ms, 3) if "stock" in timings else None
    row["installed_ms"] = round(timings["installed"].ms, 3)
    row.update(gb_per_s=round(rate, 2), copy_gb_per_s=round(copied, 2), of_copy=round(rate / copied, 3))
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="large", choices=("tiny", "large"))
    parser.add_argument("--seconds", type=float, default=1.5, help="roughly, for each case")
    parser.add_argument("--out", type=Path, help="results file; by default named after the device, none if tiny")
    options = parser.parse_args(arguments)
    out = options.out or (harness.results_path(options.device) if options.size == "large" else None)
    kept = harness.keep_pages() if options.device == "cpu" else None
    section = {"stamp": {**harness.stamp(options.device), "pages_kept": kept}, "complete": False, "rows": []}
    interleaved = harness.Interleaved(options.device)
    copy = harness.Copy(options.device, None if options.size == "large" else 1 << 16)
    for spec in specs(options.size):
        row = measure(spec, options.device, interleaved, copy, options.seconds)
        stock = f"stock {row['stock_ms']} ms" if row["stock_ms"] else f"stock: {row['stock_reason']}"
        print(f"{row['case']}: installed {row['installed_ms']} ms, {row['of_copy']:.0%} of copy; {stock}", flush=True)
        section["rows"].append(row)
    section["complete"] = True
    if out is not None:
        harness.write_section(out, "double_backward", section)
        print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
