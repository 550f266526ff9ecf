"""What only a GPU can show, in a minute: python -m benchmarks.gpu_checks.

ceilings   the rates of a copy and of a matrix product, which everything else is measured by
attention  the second derivative and the forward mode of every backend of scaled_dot_product_attention, in 16 bits,
           against float64
graphs     a penalised training step and a step of PGD, captured as CUDA graphs: replays give the eager step's numbers

With --device cpu everything runs in the form that it has there: nothing is captured, and PyTorch has one backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import robustkern as rk

from .harness import Copy, Interleaved, reason
from .step_models import MODELS

BACKENDS = {
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}
Finding = tuple[str, bool, str]  # what was looked at, whether it is right, what was found


def ceilings(device: str) -> Iterator[Finding]:
    small = device == "cpu"
    copy, n = Copy(device), 512 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    timings = Interleaved(device)({"copy": copy, "product": lambda: a @ b}, seconds=1.0)
    yield "copy", True, f"{copy.gb_per_s(timings['copy']):.0f} GB/s, read and written"
    yield "bfloat16 matrix product", True, f"{2 * n**3 / timings['product'].ms * 1e-9:.1f} TFLOP/s"


def _second_derivatives(q: Tensor, k: Tensor, v: Tensor, seeds: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """Of <w, attention>: the gradients of <u, its gradients> in q, k, v and in w."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    w = seeds[0].to(q.dtype).requires_grad_()
    value = F.scaled_dot_product_attention(*inputs, **options)  # type: ignore[arg-type]
    first = torch.autograd.grad(value, inputs, w, create_graph=True)
    total = sum((u.to(g.dtype) * g).sum() for u, g in zip(seeds[1:], first, strict=True))
    return list(torch.autograd.grad(total, [*inputs, w]))  # type: ignore[arg-type]


def _forward_mode(q: Tensor, k: Tensor, v: Tensor, seeds: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """Of attention: its value and tangent, and the gradients of <w, both> in q, k and v."""
    inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
    w, *tangents = (t.to(q.dtype) for t in seeds)

    def function(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)  # type: ignore[arg-type]

    value, tangent = torch.func.jvp(function, inputs, tuple(tangents))
    return [value.detach(), tangent.detach(), *torch.autograd.grad((w * (value + tangent)).sum(), inputs)]


ORDERS = {"": _second_derivatives, ", forward mode": _forward_mode}


def attention(device: str) -> Iterator[Finding]:
    for name, derivatives in ORDERS.items():
        yield from _attention(device, name, derivatives)


def _attention(device: str, order: str, derivatives: Callable[..., list[Tensor]]) -> Iterator[Finding]:
    tokens = 40 if device == "cpu" else 257
    cases: dict[str, tuple[int, dict[str, object]]] = {
        "plain": (4, {}),
        "causal": (4, {"is_causal": True}),
        "grouped queries": (2, {"enable_gqa": True}),
    }
    for name, (key_heads, options) in cases.items():
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 4, tokens, 64), (2, key_heads, tokens, 64), (2, key_heads, tokens, 64)]
        q, k, v = (torch.randn(s, generator=generator).to(device) for s in shapes)
        seeds = tuple(torch.randn(s, generator=generator).to(device) for s in [shapes[0], *shapes])
        for dtype in (torch.bfloat16, torch.float16):
            narrow = [t.to(dtype) for t in (q, k, v)]
            narrow_seeds = tuple(t.to(dtype).double() for t in seeds)
            with sdpa_kernel(SDPBackend.MATH):
                exact = derivatives(*(t.double() for t in narrow), narrow_seeds, **options)
                stock = _errors(derivatives(*narrow, narrow_seeds, **options), exact)
            for backend in BACKENDS[device]:
                label = f"attention{order}, {name}, {str(dtype)[6:]}, {backend.name.lower()}"
                try:
                    with rk.fused_double_backward(), sdpa_kernel(backend):
                        ours = _errors(derivatives(*narrow, narrow_seeds, **options), exact)
                except RuntimeError as error:
                    # A backend that PyTorch does not have here, or not for this call, is no fault of ours.
                    missing = "No available kernel" in str(error) or "no viable backend" in str(error).lower()
                    yield label, missing, reason(error)
                    continue
                bound = 2 * max(stock) + 4 * torch.finfo(dtype).eps
                right = all(error <= bound for error in ours)  # NaN is not
                yield label, right, f"error {max(ours):.1e}; PyTorch's composed formula {max(stock):.1e}"


def _errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True)]


def _replayed(device: str, step: Callable[[], list[Tensor]], change: Callable[[], None]) -> list[list[Tensor]]:
    """What `step` gives after a change of its inputs: run as it is, and, on a GPU, replayed from a graph."""
    if device == "cpu":
        change()
        return [[t.clone() for t in step()] for _ in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    change()
    graph.replay()
    replayed = [t.clone() for t in captured]
    return [[t.clone() for t in step()], replayed]


def graphs(device: str) -> Iterator[Finding]:
    names = ["tiny PreAct-ResNet, BatchNorm", "tiny ConvNeXt", "tiny ViT"]
    for name in names:
        for narrow in (False, True):
            yield _graph_of(device, name, narrow)
    yield _graph_of_an_attack(device)


def _graph_of(device: str, name: str, narrow: bool) -> Finding:
    torch.manual_seed(0)
    shape = (3, 16, 16)
    model = MODELS[name](shape).to(device)
    x, y = torch.rand(8, *shape, device=device).requires_grad_(), torch.randint(10, (8,), device=device)
    parameters = list(model.parameters())
    label = f"graph of a penalised step, {name}{', bfloat16' if narrow else ''}"

    def step() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16) if narrow else nullcontext():
            loss = F.cross_entropy(model(x), y, reduction="none")
        penalty = rk.gradient_norm(loss, x, p=2).mean()
        return list(torch.autograd.grad(loss.mean() + penalty, parameters, materialize_grads=True))

    def change() -> None:
        with torch.no_grad():
            x.copy_(torch.rand_like(x))

    try:
        with rk.fused_double_backward():
            eager, replayed = _replayed(device, step, change)
    except RuntimeError as error:
        return label, False, reason(error)
    off = max(float((a - b).norm() / (a.norm() + 1e-30)) for a, b in zip(eager, replayed, strict=True))
    finite = all(bool(t.isfinite().all()) for t in (*eager, *replayed))
    return label, finite and off < 1e-3, f"replay is {off:.1e} from the eager step"


def _graph_of_an_attack(device: str) -> Finding:
    torch.manual_seed(0)
    shape = (3, 16, 16)
    model = MODELS["tiny ConvNeXt"](shape).to(device).eval()
    x, y = torch.rand(8, *shape, device=device), torch.randint(10, (8,), device=device)
    adversary = x.clone()

    def step() -> list[Tensor]:
        moved = adversary.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(moved), y, reduction="sum"), moved)
        result = adversary.clone()
        rk.ops.attack_step(result, x, grad, eps=0.03, step_size=0.01)
        return [result]

    def change() -> None:
        x.copy_(torch.rand_like(x))
        adversary.copy_(x)

    label = "graph of a step of PGD"
    try:
        (eager,), (replayed,) = _replayed(device, step, change)
    except RuntimeError as error:
        return label, False, reason(error)
    moved = float((replayed - x).abs().max())
    inside = 0.0099 < moved < 0.0101
    return label, inside and bool((eager - replayed).abs().max() < 0.021), f"moved by {moved:.4f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    device = parser.parse_args(arguments).device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    wrong = looked_at = 0
    for check in (ceilings, attention, graphs):
        for label, right, found in check(device):
            looked_at += 1
            wrong += not right
            print(f"{'  ' if right else 'X '}{label}: {found}", flush=True)
    print(f"{looked_at} checks, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
