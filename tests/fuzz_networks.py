"""Random networks, differentiated to a random order in a random way: installed against stock against float64.

    python tests/fuzz_networks.py --seeds 0:2000 [--order 3] [--dtype float32] [--minutes 10] [--having GroupNorm]
    python tests/fuzz_networks.py --case "Case(...)"        # as it was printed

A seed makes a Case: layers and a loss in Python's own words, features (checkpoints, hooks, writes, ...) and a way to
differentiate.  It runs without robustkern, with `install()` and with `install(materialize_zeros=True)`.  What is held:

* where PyTorch works, installed works and agrees: None is zero, or, with materialize_zeros, None where PyTorch's is;
* where PyTorch raises, installed raises or is right.  Right is what float64 gives in elementary operators (`COMPOSITES`),
  and PyTorch in these operators where it has no derivative of its own;
* errors in float32 and below, and differences in float64, are at most a few times PyTorch's own and those that one
  rounding after each layer makes;
* what is finite in PyTorch is finite.

A failing case is printed after it has lost every layer and feature that it can fail without.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import math
import random
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import robustkern as rk

Results = dict[str, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One network, its input and how it is differentiated; its repr is the recipe."""

    seed: int = 0  # of the values
    dtype: str = "float64"
    shape: tuple[int, ...] = (2, 4)
    layout: str = "contiguous"
    layers: tuple[str | int, ...] = ()  # modules or expressions of x; a number is that layer once more
    loss: str = "y.square().sum()"
    how: str = "grad"
    order: int = 2
    reduce: str = "square"  # how the gradients make the scalar that is differentiated next
    features: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        default = Case()
        return f"Case({', '.join(f'{k}={v!r}' for k, v in fields if k == 'seed' or v != getattr(default, k))})"

    def without(self, *features: str) -> Case:
        return dataclasses.replace(self, features={k: v for k, v in self.features.items() if k not in features})


# ---------------------------------------------------------------- what layers are made of


class Fn(nn.Module):
    """An expression of x and of parameters of the shapes given; None stays None."""

    def __init__(self, text: str, **shapes: tuple[int, ...] | None) -> None:
        super().__init__()
        self.text, self.names = text, list(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.rand(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return compiled(f"lambda {', '.join(['x', *self.names])}: {self.text}")(x, *(getattr(self, n) for n in self.names))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Attention(nn.Module):
    """Of [N, T, D]; `groups` heads of keys and values, the last `keys` positions, and a mask: bool, float or learned."""

    def __init__(self, size: int, heads: int, groups: int, keys: int, mask: str | None, causal: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.keys, self.mask, self.causal = heads, groups, keys, mask, causal
        width = size // heads
        self.q, self.k, self.v = (nn.Linear(size, n * width) for n in (heads, groups, groups))
        self.learned = nn.Parameter(torch.zeros(16, 16)) if mask == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        past = x[:, -self.keys :]
        q, k, v = (f(h).unflatten(-1, (n, -1)).transpose(1, 2)
                   for f, h, n in ((self.q, x, self.heads), (self.k, past, self.groups), (self.v, past, self.groups)))  # fmt: skip
        shape = x.shape[1], past.shape[1]
        mask = None if self.learned is None else self.learned[: shape[0], : shape[1]].to(q.dtype)
        if self.mask in ("bool", "float"):
            mask = torch.arange(math.prod(shape)).view(shape) % 3 != 1
            mask = mask if self.mask == "bool" else torch.zeros(shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
        options = {"enable_gqa": True} if self.groups != self.heads else {}
        h = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, **options)
        return h.transpose(1, 2).flatten(2)


class Stop(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> None:
        return None


class AtenOnly(torch.Tensor):
    """A tensor with a tensor inside, for which only PyTorch's own operators are written."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> AtenOnly:
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim"):
            raise NotImplementedError(f"no rule for {func}")
        kwargs = kwargs or {}
        inside = tree_map_only(AtenOnly, lambda t: t.inner, (args, kwargs))
        result = tree_map_only(Tensor, lambda t: t if isinstance(t, AtenOnly) else AtenOnly(t), func(*inside[0], **inside[1]))
        return return_and_correct_aliasing(func, args, kwargs, result)


def labels(y: Tensor) -> Tensor:
    """A class for every row or pixel."""
    return torch.arange(y.shape[0] * math.prod(y.shape[2:])).remainder(y.shape[1]).view(y.shape[0], *y.shape[2:])


@functools.lru_cache(maxsize=4096)
def compiled(text: str) -> Callable[..., Any]:
    return eval(text, globals())


def make_layer(text: str) -> nn.Module:
    is_module = text.startswith(("nn.", "Fn(", "Residual(", "Attention("))
    return compiled(f"lambda: {text}")() if is_module else Fn(text)


# ---------------------------------------------------------------- the tables: random choices as text

Random = random.Random
Shape = tuple[int, ...]


def divisor(r: Random, n: int) -> int:
    return r.choice([d for d in range(1, n + 1) if n % d == 0])


def convolution(r: Random, s: Shape) -> str | None:
    d, c = len(s) - 2, s[1]
    if not 1 <= d <= 3:
        return None
    groups, k, bias = divisor(r, c), r.choice([1, 2, 3]), r.random() < 0.7
    options = f"stride={r.choice([1, 1, 2])}, dilation={r.choice([1, 1, 2])}, groups={groups}, bias={bias}"
    if r.random() < 0.3:
        return f"nn.ConvTranspose{d}d({c}, {groups * r.choice([1, 2])}, {k}, padding={r.randrange(2)}, {options})"
    mode = r.choice(["zeros", "zeros", "circular"])
    return f"nn.Conv{d}d({c}, {groups * r.choice([1, 2, 3])}, {k}, padding={k // 2}, padding_mode={mode!r}, {options})"


def depthwise(r: Random, s: Shape) -> str | None:
    d, c, k = len(s) - 2, s[1], r.choice([3, 5, 7, 11])
    if not 1 <= d <= 2:
        return None
    return f"nn.Conv{d}d({c}, {c * r.choice([1, 1, 2])}, {k}, padding={k // 2}, groups={c}, bias={r.random() < 0.5})"


def batch_norm(r: Random, s: Shape) -> str | None:
    d, c = max(1, len(s) - 2), s[1]
    if r.random() < 0.3:
        shapes = [(c,), None] if r.random() < 0.5 else [None, (c,)]
        return f"Fn('F.batch_norm(x, None, None, w, b, True)', w={shapes[0]}, b={shapes[1]})"
    options = f"affine={r.random() < 0.7}, track_running_stats={r.random() < 0.7}"
    return f"nn.BatchNorm{d}d({c}, {options}){r.choice(['', '', '.eval()'])}"


def instance_norm(r: Random, s: Shape) -> str | None:
    options = f"affine={r.random() < 0.7}, track_running_stats={r.random() < 0.3}"
    return f"nn.InstanceNorm{len(s) - 2}d({s[1]}, {options}){r.choice(['', '.eval()'])}" if len(s) > 2 else None


def group_norm(r: Random, s: Shape) -> str:
    groups, c = divisor(r, s[1]), s[1]
    if r.random() < 0.3:
        shapes = [(c,), None] if r.random() < 0.8 else [None, (c,)]
        return f"Fn('F.group_norm(x, {groups}, w, b)', w={shapes[0]}, b={shapes[1]})"
    if r.random() < 0.1:
        return f"Fn('sum(t.sum() for t in torch.native_group_norm(x.contiguous(), w, None, *x.shape[:2], {math.prod(s[2:])}, {groups}, 1e-5)) + x', w={(c,)})"
    return f"nn.GroupNorm({groups}, {c}, affine={r.random() < 0.7})"


def layer_norm(r: Random, s: Shape) -> str:
    shape = s[-r.randint(1, min(3, len(s) - 1)) :]
    if r.random() < 0.1:
        return f"Fn('F.layer_norm(x, {shape}, None, b)', b={shape})"
    return f"nn.LayerNorm({shape}, elementwise_affine={r.random() < 0.7}, bias={r.random() < 0.7})"


def rms_norm(r: Random, s: Shape) -> str:
    shape = s[-r.randint(1, min(2, len(s) - 1)) :]
    return f"nn.RMSNorm({shape}, eps={r.choice(['1e-5', 'None'])}, elementwise_affine={r.random() < 0.7})"


SMOOTH = ("F.gelu(x)", "F.gelu(x, approximate='tanh')", "F.silu(x)", "F.mish(x)", "F.softplus(x, 2, 1.5)", "F.softplus(x)",
          "F.elu(x, 0.7)", "F.celu(x, 0.7)", "F.selu(x)", "F.hardswish(x)", "x.tanh()", "x.sigmoid()", "F.logsigmoid(x)")  # fmt: skip
PIECEWISE = ("F.relu(x)", "F.relu6(3 * x)", "F.leaky_relu(x, 0.2)", "F.hardtanh(x, -0.4, 0.6)", "F.hardsigmoid(2 * x)",
             "F.hardshrink(x, 0.3)", "F.softshrink(x, 0.3)", "F.threshold(x, 0.1, 0.5)", "F.rrelu(x)", "nn.PReLU()")  # fmt: skip
OVERWRITING = ("F.silu(x, inplace=True)", "F.mish(x, inplace=True)", "F.silu(x[:, :1], inplace=True)", "F.elu(x, inplace=True)", "F.celu_(x)", "F.selu_(x)",
               "F.relu(x, inplace=True)", "F.relu6(x, inplace=True)", "F.leaky_relu(x, 0.1, inplace=True)", "F.hardtanh_(x)",
               "F.hardswish(x, inplace=True)", "F.hardsigmoid(x, inplace=True)", "x.tanh_()", "x.sigmoid_()", "x.mul_(1.5)",
               "F.threshold_(x, 0.1, 0.5)", "x.add_(0.5)")  # fmt: skip
VIEWS = ("x.transpose(1, -1)", "x.transpose(-1, -2).contiguous().transpose(-1, -2)", "x.flatten(1)", "x[:, ::2]", "x[..., 1:]",
         "x.movedim(1, -1).contiguous().movedim(-1, 1)", "x[:1].expand(x.shape)", "x.sum(1, keepdim=True).expand(x.shape)",
         "torch.cat([x, 2 * x], 1)", "torch.stack(x.unbind(1)[::-1], 1)", "x.chunk(2, 1)[0]", "x.split(1, 1)[-1]", "x.flip(1)",
         "x.roll(1, -1)", "x.unsqueeze(0).squeeze(0)", "x.reshape(x.shape[0], -1, 1)", "x.amax(1, keepdim=True) + x",
         "x.reshape(x.shape[0], -1, x.shape[1])", "torch.stack([x, x], -1)[..., 0]", "x.repeat(1, 2, *[1] * (x.dim() - 2))",
         "x.contiguous(memory_format=torch.channels_last)")  # fmt: skip
GATES = ("x + Stop.apply(x)", "Stop.apply(2 * x) + x.sin()", "Stop.apply(F.silu(x)) + x", "x * x.detach()", "x.detach() + x",
         "Stop.apply(x)", "torch.where(x > 0, x, Stop.apply(x))")  # fmt: skip
FILLERS = ("2 * x", "x * x", "x.sin()", "x + 0.5", "x.exp().log1p()", "F.normalize(x, dim=1, eps=0.1)", "x - x.mean(1, True)")


def activation(r: Random, s: Shape) -> str:
    kind = r.random()
    if kind < 0.1:
        return f"nn.PReLU({s[1]})"
    if kind < 0.2:
        dims = [d for d in range(1, len(s)) if s[d] % 2 == 0]
        return f"F.glu(x, {r.choice(dims)})" if dims else "F.silu(x)"
    return r.choice(SMOOTH if kind < 0.55 else PIECEWISE if kind < 0.8 else OVERWRITING)


def pooling(r: Random, s: Shape) -> str | None:
    d, k = len(s) - 2, r.choice([2, 3])
    if not 1 <= d <= 3:
        return None
    ceil, stride, padding = f"ceil_mode={r.random() < 0.5}", r.choice([1, 2]), r.choice([0, 1])
    counted = f"count_include_pad={r.random() < 0.5}"
    return r.choice([f"F.avg_pool{d}d(x, {k}, {stride}, {padding}, {ceil}, {counted})",
                     f"F.max_pool{d}d(x, {k}, {stride}, {padding}, {ceil}, dilation=1)",
                     f"F.max_pool{d}d(x, 2, 1, dilation=2, return_indices=True)[0]",
                     f"F.adaptive_avg_pool{d}d(x, {r.choice([1, 2, 3])})",
                     f"F.adaptive_max_pool{d}d(x, {r.choice([1, 2, 3])})"])  # fmt: skip


def softmax(r: Random, s: Shape) -> str:
    return f"x.{r.choice(['softmax', 'log_softmax'])}({r.randrange(-1, len(s))})"


def attention(r: Random, s: Shape) -> str | None:
    if len(s) != 3 or s[1] > 16:
        return None
    if r.random() < 0.2:
        act, first = r.choice(["gelu", "relu"]), r.random() < 0.5
        options = f"dropout=0, activation={act!r}, batch_first=True, norm_first={first}"
        return f"nn.TransformerEncoderLayer({s[2]}, {divisor(r, s[2])}, 3, {options})"
    heads = divisor(r, s[2])
    causal = r.random() < 0.3
    mask = None if causal else r.choice([None, "bool", "float", "learned"])
    return f"Attention({s[2]}, {heads}, {divisor(r, heads)}, {r.choice([s[1], s[1], 2])}, {mask!r}, {causal})"


def product(r: Random, s: Shape) -> str:
    d, n = s[-1], r.choice([1, 2, 3, 4])
    choices = [f"nn.Linear({d}, {n}, bias={r.random() < 0.7})"] * 3 + [f"Fn('x @ w', w={(d, n)})"]
    if len(s) == 2:
        choices += ["x @ x.t()", f"Fn('torch.addmm(b, x, w)', w={(d, n)}, b={(n,)})", f"Fn('torch.mv(x, w)[:, None]', w={(d,)})"]
    if len(s) == 3:
        choices += ["torch.bmm(x, x.transpose(1, 2))", "torch.einsum('ntd,nsd->nts', x, x.tanh())",
                    f"Fn('torch.baddbmm(x, x, w.expand(x.shape[0], -1, -1))', w={(d, d)})"]  # fmt: skip
    return r.choice(choices)


def embedding(r: Random, s: Shape) -> str:
    table = (3, s[-1])
    return f"Fn('x + F.embedding(torch.arange(x.shape[-2]) % 3, w)', w={table})"


def scale(r: Random, s: Shape) -> str:
    return f"Fn('x * w', w={s[1:]})" if r.random() < 0.5 else f"Fn('x + w', w={s[-1:]})"


def residual(r: Random, s: Shape) -> str | None:
    inner = LAYERS[r.choice(["batch_norm", "group_norm", "layer_norm", "rms_norm", "activation", "softmax"])][1](r, s)
    return f"Residual(make_layer({inner!r}))" if inner else None


# name: (weight, what a random choice and the shape of x make of it, or None)
LAYERS: dict[str, tuple[int, Callable[[Random, Shape], str | None]]] = {
    "convolution": (6, convolution),
    "depthwise": (2, depthwise),
    "batch_norm": (4, batch_norm),
    "instance_norm": (3, instance_norm),
    "group_norm": (4, group_norm),
    "layer_norm": (4, layer_norm),
    "rms_norm": (3, rms_norm),
    "activation": (9, activation),
    "pooling": (5, pooling),
    "softmax": (3, softmax),
    "attention": (5, attention),
    "product": (6, product),
    "embedding": (1, embedding),
    "scale": (2, scale),
    "residual": (3, residual),
    "view": (6, lambda r, s: r.choice(VIEWS)),
    "gate": (2, lambda r, s: r.choice(GATES)),
    "filler": (2, lambda r, s: r.choice(FILLERS)),
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "gaps": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def loss(r: Random, s: Shape) -> str:
    choices = ["y.square().sum()", "y.sin().sum()", "y.sum()", "y.exp().mean()", "y.logsumexp(1).sum()"]
    if s[1] > 1:
        reduction = f"reduction={r.choice(['mean', 'sum'])!r}"
        choices += [f"F.cross_entropy(y, labels(y), {reduction})", f"F.cross_entropy(y, y.detach().softmax(1), {reduction})",
                    f"F.cross_entropy(y, labels(y), torch.arange(1, {s[1] + 1}).to(y), ignore_index=0, label_smoothing=0.1)",
                    f"F.nll_loss(y.square(), labels(y), {reduction})",
                    "F.cross_entropy(y, labels(y), reduction='none').square().sum()"]  # fmt: skip
    return r.choice(choices)


NAMES = ("x", "*.bias", "*.weight", "0.*", "1.*", "*.[bw]", "?.*")

# name: (probability, what a random choice and the number of layers and the order make of it)
FEATURES: dict[str, tuple[float, Callable[[Random, int, int], Any]]] = {
    # a span of layers, and whether reentrant
    "checkpoint": (0.15, lambda r, n, k: (a := r.randrange(n), r.randint(a + 1, n), r.random() < 0.2)),
    "saved_tensors_hooks": (0.07, lambda r, n, k: (r.choice(["clone", "identity", "numpy"]), r.choice(["forward", "all"]))),
    "tensor_hook": (0.07, lambda r, n, k: r.randrange(n)),
    "module_hook": (0.07, lambda r, n, k: (r.randrange(n), r.choice(["forward", "backward", "backward_pre"]))),
    "autocast": (0.2, lambda r, n, k: "bfloat16"),  # of float32 only
    "frozen": (0.3, lambda r, n, k: r.choice([("x",), ("?.*",), ("*.bias",), ("*.weight",), ("0.*",), ("x", "*.weight")])),
    "inference": (0.03, lambda r, n, k: r.choice(["*.bias", "*.b", "*.weight"])),  # parameters made in inference mode
    "nonleaf": (0.2, lambda r, n, k: r.choice(["x * 1.0", "x.view_as(x)", "x.clone()"])),
    "twice": (0.1, lambda r, n, k: True),  # two forwards
    "write": (0.12, lambda r, n, k: (r.choice(["between", "forward", "first"]), r.choice(NAMES))),
    "switch": (0.25, lambda r, n, k: "".join(r.choice("01s") for _ in range(k + 1))),  # in the forward and each backward
    "nonfinite": (0.08, lambda r, n, k: (r.choice(NAMES), r.choice(["inf", "nan"]))),
    "retain": (0.1, lambda r, n, k: True),  # the last backward twice
    "batched": (0.2, lambda r, n, k: (r.choice(["vmap", "is_grads_batched"]), r.randint(1, k))),
    "only": (0.3, lambda r, n, k: r.choice(NAMES)),  # the gradients that are differentiated again
    "mixed": (0.2, lambda r, n, k: True),  # together with the loss
    "subclass": (0.04, lambda r, n, k: True),
}
AUTOGRAD = {"grad": 10, "backward": 4}
FUNCTIONAL = {"func.grad": 2, "func.jvp": 1, "func.hessian": 1, "functional.hessian": 1, "forward_ad": 1, "make_fx": 0.15}
HOWS = AUTOGRAD | FUNCTIONAL


def pick(r: Random, weights: dict[Any, float]) -> Any:
    return r.choices(list(weights), list(weights.values()))[0]


def make_case(seed: int, **given: Any) -> tuple[Case, Counter[str]]:
    """The case of a seed, with some of its fields as given, and the names of the choices that made it."""
    r = Random(seed)
    batch, width = pick(r, {0: 0.3, 1: 2, 2: 6, 3: 3}), r.choice([1, 2, 3, 4, 4, 6])
    inner = r.choice([(), (3,), (5,), (4,), (4, 4), (5, 3), (2, 3, 3), (3, 3, 2)])
    shape = (batch, width, *inner)
    dtype = given.get("dtype") or pick(r, {"float64": 7, "float32": 2, "bfloat16": 0.7, "float16": 0.3})
    order = given.get("order") or pick(r, {1: 2, 2: 6, 3: 2})
    layers: list[str | int] = []
    shapes = [shape]
    kinds: Counter[str] = Counter()
    x = torch.zeros(shape)
    with torch.no_grad():
        for _ in range(r.choice([1, 2, 3, 3, 4, 5, 6])):
            if layers and r.random() < 0.05:
                kind, text = "shared", r.choice([i for i, made in enumerate(layers) if isinstance(made, str)])
            else:
                kind = pick(r, {name: weight for name, (weight, _) in LAYERS.items()})
                text = LAYERS[kind][1](r, tuple(x.shape))
            try:
                y = make_layer(layers[text] if isinstance(text, int) else text)(x.clone()) if text is not None else None
            except (RuntimeError, ValueError, IndexError):
                continue
            if y is not None and y.dim() >= 2 and y.numel() <= 500 and 0 not in y.shape[1:]:
                layers, x, kinds = [*layers, text], y, kinds + Counter([kind])
                shapes.append(tuple(x.shape))
    layers = layers or ["F.gelu(x)"]
    how, dense = pick(r, HOWS), r.choice([1, 1, 1, 3])
    features = {
        name: make(r, len(layers), order)
        for name, (probability, make) in FEATURES.items()
        if r.random() < dense * probability and (name not in ("autocast",) or dtype == "float32")
    }
    if how in FUNCTIONAL:
        features = {k: v for k, v in features.items() if k in ("nonfinite", "autocast", "frozen")}
    elif layers[0] in OVERWRITING:
        features.setdefault("nonleaf", "x * 1.0")
    if features.get("saved_tensors_hooks", ("",))[0] == "identity":
        features.pop("write", None)  # nothing would notice it
    if "checkpoint" in features and (how, order) != ("backward", 1):
        features["checkpoint"] = (*features["checkpoint"][:2], False)  # the other kind has no second derivative
    layout = pick(r, dict.fromkeys(LAYOUTS, 1) | {"contiguous": 3, "channels_last": 3 if len(shape) > 3 else 0})
    case = Case(seed, dtype, shape, layout, tuple(layers), loss(r, tuple(x.shape)), how, order,
                r.choice(["square", "sin", "linear"]), features)  # fmt: skip
    if "nonfinite" in features and len(shapes) > 1 and r.random() < 0.7:  # so that it does not spread to everything
        n = min(len(layers), r.choice([1, 1, 2]))
        case = dataclasses.replace(case, layers=(*layers[:n], f"Fn('x * w', w={shapes[n][1:]})"), loss="y.sum()", reduce="linear")
    return case, kinds + Counter([*features, how, dtype, f"order {order}", layout, f"batch {batch}"])


# ---------------------------------------------------------------- elementary operators


NOISE = 0.0  # relative, of every layer's result and within normalisations


def rounded(t: Tensor, phase: float = 0) -> Tensor:
    """t, as if each element had been rounded by up to NOISE; so are its gradients."""
    if not NOISE:
        return t
    waves = torch.arange(t.numel(), dtype=t.dtype).mul(1.7).add(1e15 * NOISE + phase).cos()
    return t * (1 + NOISE * waves.view(t.shape))


def normalized(x: Tensor, dims: list[int], eps: float, centred: bool = True) -> Tensor:
    d = rounded(rounded(x, 1) - rounded(x.mean(dims, True), 2), 3) if centred else rounded(x, 1)
    return d * rounded((d.square().mean(dims, True) + eps).rsqrt(), 4)


def affine(y: Tensor, w: Tensor | None, b: Tensor | None, first: int) -> Tensor:
    """y times w plus b, which lie along the dimensions of y from `first` on."""
    def along(p: Tensor) -> Tensor:
        return p.view(*p.shape, *[1] * (y.dim() - first - p.dim()))

    y = y if w is None else y * along(w)
    return y if b is None else y + along(b)


def composite_batch_norm(x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
                         momentum: float = 0.1, eps: float = 1e-5) -> Tensor:  # fmt: skip
    dims = [d for d in range(x.dim()) if d != 1]
    if training:
        if mean is not None:
            F_batch_norm(x.detach(), mean, var, None, None, True, momentum, eps)  # moves the running statistics
        return affine(normalized(x, dims, eps), weight, bias, 1)
    y = affine(x, torch.ones_like(mean), -mean, 1)
    return affine(affine(y, (var + eps).rsqrt(), None, 1), weight, bias, 1)


F_batch_norm, F_instance_norm, F_group_norm = F.batch_norm, F.instance_norm, F.group_norm


def composite_instance_norm(x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
                            use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return composite_batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F_instance_norm(x.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return affine(normalized(x, list(range(2, x.dim())), eps), weight, bias, 1)


def composite_group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    return affine(normalized(x.reshape(x.shape[0], groups, -1), [2], eps).reshape(x.shape), weight, bias, 1)


def composite_layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    first = x.dim() - len(shape)
    return affine(normalized(x, list(range(first, x.dim())), eps), weight, bias, first)


def composite_rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    first = x.dim() - len(shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return affine(normalized(x, list(range(first, x.dim())), eps, False), weight, None, first)


def composite_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0, is_causal: bool = False,
                        scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if enable_gqa else t for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ v


def composite_hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    y = F.relu6(x + 3)
    slope = torch.tensor(1 / 6, dtype=torch.float32).item()  # PyTorch's, in every dtype
    y = y * slope + (y / 6 - y * slope).detach()
    return x.copy_(y) if inplace else y


def safe_group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's, which crashes for channels_last images where no gradient is asked for."""
    return F_group_norm(x if x.requires_grad else x.contiguous(), *args, **kwargs)


COMPOSITES = {
    "batch_norm": composite_batch_norm,
    "instance_norm": composite_instance_norm,
    "group_norm": composite_group_norm,
    "layer_norm": composite_layer_norm,
    "rms_norm": composite_rms_norm,
    "scaled_dot_product_attention": composite_attention,
    "hardsigmoid": composite_hardsigmoid,
}


# ---------------------------------------------------------------- running a case


class Switch:
    """robustkern on or off in each phase: the forward, then one backward after the other."""

    def __init__(self, case: Case, mode: str | None) -> None:
        self.states, self.mode, self.scope = case.features.get("switch", "1"), mode, ExitStack()

    def __call__(self, phase: int) -> None:
        self.off()
        state = self.states[min(phase, len(self.states) - 1)] if self.mode else "0"
        if state == "1" or (state == "s" and self.mode == "zeros"):
            rk.install(materialize_zeros=self.mode == "zeros")
        elif state == "s":
            self.scope.enter_context(rk.fused_double_backward())

    def off(self) -> None:
        self.scope.close()
        rk.uninstall()


def matches(name: str, *patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in patterns)


class Network(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.layers = nn.ModuleList()
        for text in case.layers:
            self.layers.append(self.layers[text] if isinstance(text, int) else make_layer(text))
        if "module_hook" in case.features:
            index, kind = case.features["module_hook"]
            module = self.layers[index % len(self.layers)]
            if kind == "forward":
                module.register_forward_hook(lambda m, inputs, output: output * 1.5)
            elif kind == "backward":
                module.register_full_backward_hook(lambda m, inputs, outputs: tuple(None if g is None else g * 2 for g in inputs))
            else:
                module.register_full_backward_pre_hook(lambda m, outputs: (outputs[0] * 2,))

    def span(self, h: Tensor, first: int, last: int) -> Tensor:
        for i, layer in enumerate(self.layers[first:last], first):
            h = layer(h)
            if self.case.features.get("tensor_hook") == i and h.requires_grad:
                h.register_hook(lambda g: g * 2)
            h = rounded(h, i)
        return h

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.layers)
        first, last, reentrant = self.case.features.get("checkpoint", (n, n, False))
        x = self.span(x, 0, first)
        if first < min(last, n):
            x = checkpoint(self.span, x, first, last, use_reentrant=reentrant)
        return self.span(x, last, n)


HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "clone": (lambda t: t.detach().clone(), lambda t: t),
    "identity": (lambda t: t, lambda t: t),
    "numpy": (lambda t: (t.detach().double().numpy().copy(), t.dtype), lambda p: torch.from_numpy(p[0]).to(p[1])),
}


class Run:
    """One execution of a case; `results` are what it has found, by name."""

    def __init__(self, case: Case, mode: str | None = None, exact: bool = False) -> None:
        self.case, self.features, self.results, self.exact = case, case.features, Results(), exact
        self.switch = Switch(case, mode)
        torch.manual_seed(case.seed)
        own = getattr(torch, case.dtype)
        self.dtype = torch.float64 if exact else own
        self.net = Network(case)
        self.generator = torch.Generator().manual_seed(case.seed)
        place, value = self.features.get("nonfinite", ("", "0"))
        inference, frozen = self.features.get("inference", ""), self.features.get("frozen", ())

        def valued(name: str, t: Tensor) -> Tensor:
            t = (t + 0.4 * torch.randn(t.shape, generator=self.generator, dtype=torch.float64)).to(own).to(self.dtype)
            if matches(name, place) and t.numel():
                t.view(-1)[t.numel() // 2] = float(value)
            return t

        self.wanted: dict[str, Tensor] = {}
        self.leaf = LAYOUTS[case.layout](valued("x", 0.6 * torch.randn(case.shape, generator=self.generator))).detach()
        if "subclass" in self.features:
            self.leaf = AtenOnly(self.leaf)
        self.wanted["x"] = self.leaf.requires_grad_(not matches("x", *frozen))
        self.net.to(self.dtype)
        for name, p in list(self.net.named_parameters()):
            name = name.removeprefix("layers.")
            p.data = valued(name, p.data.double())
            p.requires_grad_(not matches(name, *frozen))
            if matches(name, inference):
                module, _, attribute = name.rpartition(".")
                with torch.inference_mode():
                    made = nn.Parameter(p.detach().clone(), requires_grad=False)
                self.net.layers.get_submodule(module)._parameters[attribute] = made
            else:
                self.wanted[name] = p
        self.named = dict(self.wanted)
        self.wanted = {name: t for name, t in self.wanted.items() if t.requires_grad}

    def __call__(self) -> Results:
        with ExitStack() as stack:
            stack.callback(self.switch.off)
            self.switch(0)
            if self.case.how in AUTOGRAD:
                self.by_autograd(stack)
            else:
                self.by_functions()
        for name, buffer in self.net.named_buffers():
            self.results[f"buffer {name}"] = buffer
        plain = {name: t.inner if isinstance(t, AtenOnly) else t for name, t in self.results.items()}
        return {name: None if t is None else t.detach() for name, t in plain.items()}

    def loss(self, x: Tensor) -> Tensor:
        autocast = self.features.get("autocast") if self.dtype == torch.float32 else None
        with torch.autocast("cpu", getattr(torch, autocast)) if autocast else nullcontext():
            y = self.net(x)
            return compiled(f"lambda y: {self.case.loss}")(y)

    def write(self, when: str) -> None:
        if self.features.get("write", ("",))[0] == when:
            with torch.no_grad():
                for name, t in self.named.items():
                    if matches(name, self.features["write"][1]):
                        t.mul_(1.25)

    def forward(self) -> Tensor:
        x = self.leaf
        if "nonleaf" in self.features:
            x = compiled(f"lambda x: {self.features['nonleaf']}")(x)
        total = self.loss(x)
        self.write("between")
        if "twice" in self.features:
            total = total + self.loss(1.5 * x)
        return total

    def random_like(self, name: str, t: Tensor, *batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.case.seed} {name}".encode()))
        c = torch.randn(*batch, *t.shape, generator=generator, dtype=torch.float64)
        return LAYOUTS["reversed"](c).to(t.dtype) if t.dim() > 1 else c.to(t.dtype)

    def objective(self, tensors: dict[str, Tensor]) -> Tensor:
        if self.case.reduce == "linear":
            return sum((t * self.random_like(name, t)).sum() for name, t in tensors.items())
        return sum((t.square() if self.case.reduce == "square" else t.sin()).sum() for t in tensors.values())

    def by_autograd(self, stack: ExitStack) -> None:
        kind, extent = self.features.get("saved_tensors_hooks", ("", ""))
        hooks = ExitStack()
        if kind:
            hooks.enter_context(saved_tensors_hooks(*HOOKS[kind]))
        with hooks:
            total = self.results["loss"] = self.forward()
            if extent == "all":
                stack.enter_context(hooks.pop_all())
        self.write("forward")
        only, order = self.features.get("only"), self.case.order
        outputs = {"loss": total}
        for k in range(1, order + 1):
            if not total.requires_grad:
                self.results.update({f"order {i} {name}": None for i in range(k, order + 1) for name in self.wanted})
                return
            self.switch(k)
            grads = self.backward(k, total, outputs, last=k == order)
            self.results.update({f"order {k} {name}": g for name, g in grads.items()})
            if k == 1:
                self.write("first")
            chosen = {name: g for name, g in grads.items() if g is not None and (not only or matches(name, only))}
            outputs = {name: g for name, g in chosen.items() if g.requires_grad}
            mixed = total if "mixed" in self.features else 0
            total = self.objective(chosen) + mixed
            if not isinstance(total, Tensor):
                total = torch.zeros(())

    def backward(self, k: int, total: Tensor, outputs: dict[str, Tensor], last: bool) -> dict[str, Tensor | None]:
        inputs = list(self.wanted.values())
        how, stage = self.features.get("batched", ("", 0))
        retain = not last or "retain" in self.features
        options: dict[str, Any] = {"create_graph": not last, "retain_graph": retain, "allow_unused": True}
        if stage == k and outputs:
            values, cotangents = list(outputs.values()), [self.random_like(name, t, 2) for name, t in outputs.items()]
            if how == "is_grads_batched":
                return dict(zip(self.wanted, torch.autograd.grad(values, inputs, cotangents, **options, is_grads_batched=True)))
            absent: list[bool] = []

            def pull(*cotangents: Tensor) -> tuple[Tensor, ...]:
                grads = torch.autograd.grad(values, inputs, cotangents, **options)
                absent[:] = [g is None for g in grads]
                return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads))

            found = torch.vmap(pull)(*cotangents)
            return {name: None if none else g for name, none, g in zip(self.wanted, absent, found)}
        if last and self.case.how == "backward":
            for t in inputs:
                t.grad = None
            for _ in range(1 + (retain and last)):
                total.backward(retain_graph=retain)
            return {name: t.grad for name, t in self.wanted.items()}
        grads = torch.autograd.grad(total, inputs, **options)
        if last and retain:
            again = torch.autograd.grad(total, inputs, allow_unused=True)
            self.results.update({f"again {name}": g for name, g in zip(self.wanted, again)})
        return dict(zip(self.wanted, grads))

    def by_functions(self) -> None:
        names, args = list(self.wanted), tuple(t.detach() for t in self.wanted.values())
        how, order = self.case.how, self.case.order
        if not args:
            return

        def scalar(*values: Tensor) -> Tensor:
            given = dict(zip(names, values))
            x = given.pop("x", self.leaf.detach())
            state = {f"layers.{name}": t for name, t in given.items()}
            with torch.nn.utils.stateless._reparametrize_module(self.net, state):
                return self.loss(x)

        argnums = tuple(range(len(args)))

        def gradient(f: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
            return torch.func.grad(f, argnums)

        def norm(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
            return lambda *values: sum(g.sin().sum() for g in f(*values))

        if how == "func.grad":
            f = scalar
            for _ in range(order - 1):
                f = norm(gradient(f))
            found = gradient(f)(*args)
        elif how == "func.jvp":
            f = gradient(scalar if order < 3 else norm(gradient(scalar)))
            found = torch.func.jvp(f, args, tuple(self.random_like(name, t) for name, t in zip(names, args)))[1]
        elif how == "func.hessian":
            f = torch.func.hessian(lambda x: scalar(x, *args[1:]))
            found = (torch.func.grad(lambda x: f(x).sin().sum()) if order == 3 else f)(args[0])
        elif how == "functional.hessian":
            create = order == 3
            x = args[0].clone().requires_grad_()
            strategy = self.case.reduce == "linear" and not create
            found = torch.autograd.functional.hessian(
                lambda x: scalar(x, *args[1:]), x, vectorize=True, create_graph=create,
                outer_jacobian_strategy="forward-mode" if strategy else "reverse-mode",
            )  # fmt: skip
            if create:
                (found,) = torch.autograd.grad(found.sin().sum(), x, allow_unused=True) if found.requires_grad else (None,)
        elif how == "forward_ad":
            with forward_ad.dual_level():
                duals = tuple(forward_ad.make_dual(t.clone().requires_grad_(), self.random_like(name, t)) for name, t in zip(names, args))
                grads = torch.autograd.grad(scalar(*duals), duals, create_graph=order > 2, allow_unused=True)
                found = tuple(None if g is None else forward_ad.unpack_dual(g).tangent for g in grads)
        else:  # make_fx

            def first(*values: Tensor) -> tuple[Tensor, ...]:
                grads = torch.autograd.grad(scalar(*values), values, create_graph=True, allow_unused=True)
                return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(values, grads))

            leaves = [t.clone().requires_grad_() for t in args]
            traced = first if self.exact else make_fx(first)(*leaves)  # which cuts what is saved of outputs
            total = sum(g.sin().sum() for g in traced(*leaves))
            found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,) * len(leaves)
        found = found if isinstance(found, tuple) else (found,)
        self.results.update({f"{how} {name}": t for name, t in zip(names, found)})


UNDERIVABLE = {name: COMPOSITES[name] for name in ("scaled_dot_product_attention", "hardsigmoid")}  # twice, by PyTorch


def attempt(case: Case, mode: str | None = None, functions: dict[str, Any] | None = None, **options: Any) -> Results | Exception:
    """What a run finds, or what it raises; `functions` stand in for those of torch.nn.functional."""
    try:
        with mock.patch.multiple(F, **{"group_norm": safe_group_norm} | (functions or {})):
            return Run(case, mode, **options)()
    except Exception as error:
        return error


# ---------------------------------------------------------------- judging


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}"


def norm(t: Tensor) -> float:
    return float(t.double().nan_to_num(0, 0, 0).norm())


def difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Where theirs is finite."""
    if ours is None or theirs is None:
        return norm(theirs) if ours is None and theirs is not None else norm(ours) if ours is not None else 0.0
    return norm(torch.where(torch.isfinite(theirs), ours.double() - theirs.double(), 0))


class Judge:
    """Compares installed with stock; what that takes in float64 is computed only where they differ."""

    def __init__(self, case: Case) -> None:
        self.case, self.basis, self.expected, self.strict = case, "stock", attempt(case), True
        if isinstance(self.expected, Exception) and not {"write", "checkpoint"} <= set(case.features):
            # Whether installed must work: where PyTorch has no more than no derivative of an operator that is replaced.
            missing = "derivative for" in str(self.expected) and case.how in AUTOGRAD
            self.strict = missing and not {"switch", "subclass", "write"} & set(case.features)
            self.case = case.without("write", "subclass")
            for self.basis, functions in ("attention as a composite", UNDERIVABLE), ("composites", COMPOSITES):
                self.expected = attempt(self.case, functions=functions)
                if not isinstance(self.expected, Exception):
                    break

    @functools.cached_property
    def exact(self) -> Results:
        for case in (self.case, self.case.without("write")):  # which autocast hides in its copies
            found = attempt(case, functions=COMPOSITES, exact=True)
            if not isinstance(found, Exception):
                return found
        return self.expected

    @functools.cached_property
    def roundings(self) -> list[Results]:
        eps = max(torch.finfo(getattr(torch, d)).eps for d in (self.case.dtype, self.case.features.get("autocast", "float64")))
        runs = []
        for scale in (1, -1, 0.7):
            with mock.patch.object(sys.modules[__name__], "NOISE", eps * scale):
                runs.append(attempt(self.case, functions=COMPOSITES, exact=True))
        return [run for run in runs if not isinstance(run, Exception)]

    def judge(self, mode: str, ours: Results | Exception) -> tuple[str, str | None]:
        """What was compared, and what is wrong."""
        if isinstance(self.expected, Exception):
            return "both raise" if isinstance(ours, Exception) else "unverified", None
        if isinstance(ours, Exception):
            if not self.strict:
                return "both raise", None
            return self.basis, f"{mode}: raises where {self.basis} works: {one_line(ours)}"
        for name, theirs in self.expected.items():
            wrong = self.compare(name, ours.get(name), theirs, mode == "zeros" and self.basis == "stock")
            if wrong:
                return self.basis, f"{mode}: {name} {wrong}"
        if self.case.how in FUNCTIONAL and self.case.dtype == "float64":
            right = [difference(t, self.exact.get(name)) <= 1e-6 * (1 + norm(t)) for name, t in ours.items() if t is not None]
            return self.basis if all(right) else "as wrong as stock", None
        return self.basis, None

    def compare(self, name: str, ours: Tensor | None, theirs: Tensor | None, nones: bool) -> str | None:
        if ours is None and theirs is None:
            return None
        if nones and (ours is None) != (theirs is None) and not norm(theirs if ours is None else ours):
            return f"is {'None' if ours is None else 'a tensor'}, stock's is {'None' if theirs is None else 'a tensor'}"
        if ours is not None and theirs is not None:
            if ours.shape != theirs.shape:
                return f"has shape {tuple(ours.shape)}, stock's {tuple(theirs.shape)}"
            if self.basis == "stock" and ours.dtype != theirs.dtype:
                return f"is {ours.dtype}, stock's {theirs.dtype}"
            lost = int((torch.isfinite(theirs) & ~torch.isfinite(ours)).sum())
            if self.basis == "stock" and lost and ("nonfinite" in self.case.features or self.case.dtype != "float16"):
                return f"is not finite in {lost} of {ours.numel()} places where stock is"
        eps = torch.finfo(getattr(torch, self.case.dtype)).eps
        tolerance = 1e-9 if self.case.dtype == "float64" else 4 * eps
        group = [t for key, t in self.expected.items() if key.rpartition(" ")[0] == name.rpartition(" ")[0]]
        size = 1 + max((norm(t) for t in group if t is not None), default=0)
        apart = difference(ours, theirs)
        if apart <= tolerance * size:
            return None
        exact = self.exact.get(name)
        error, stock_error = difference(ours, exact), difference(theirs, exact)
        noise = max((difference(run.get(name), exact) for run in self.roundings), default=0)
        # Formulas that PyTorch does not have may round more than once where elementary operators do, in cancelling terms.
        if error <= 4 * stock_error + (10 if self.basis == "stock" else 1000) * noise + tolerance * size:
            return None
        if self.basis != "stock" and "0" in self.case.features.get("switch", ""):
            return None  # PyTorch's own derivatives took part
        figures = f"installed {error:.2g}, {self.basis} {stock_error:.2g}, roundings {noise:.2g}, size {size:.2g}"
        return f"differs by {apart:.2g}; errors: {figures}"


def check(case: Case) -> tuple[str, str | None]:
    """How the case was judged, and what is wrong with it."""
    judge = Judge(case)
    kind = ""
    for mode in ("default", "zeros"):
        kind, wrong = judge.judge(mode, attempt(case, mode))
        if wrong:
            return kind, wrong
    return kind, None


def smaller(case: Case) -> Iterator[Case]:
    replace = dataclasses.replace
    for name in case.features:
        yield case.without(name)
    for i in range(len(case.layers)):
        yield replace(case, layers=case.layers[:i] + case.layers[i + 1 :])
    yield replace(case, how="grad")
    yield replace(case, layout="contiguous")
    yield replace(case, dtype="float64")
    for order in range(1, case.order):
        yield replace(case, order=order)
    for text in ("y.sum()", "y.square().sum()"):
        yield replace(case, loss=text)
    yield replace(case, reduce="square")
    if "switch" in case.features:
        for i in range(len(case.features["switch"])):
            states = case.features["switch"]
            yield replace(case, features=case.features | {"switch": states[:i] + "1" + states[i + 1 :]})


def shrink(case: Case, seconds: float = 20) -> tuple[Case, str]:
    """The case without whatever it fails without, and how it fails then."""
    end, (_, wrong) = time.monotonic() + seconds, check(case)
    assert wrong
    tried = set()
    while time.monotonic() < end:
        for candidate in smaller(case):
            if repr(candidate) in tried or candidate == case:
                continue
            tried.add(repr(candidate))
            _, still = check(candidate)
            if still:
                case, wrong = candidate, still
                break
        else:
            break
    return case, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:300", help="first:last")
    parser.add_argument("--order", type=int, choices=(1, 2, 3))
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--having", default="", help="only cases whose recipe has this text")
    parser.add_argument("--case", help="one case, as it was printed")
    options = parser.parse_args(arguments)
    if options.case:
        kind, wrong = check(eval(options.case))
        print(wrong or f"agrees ({kind})")
        return bool(wrong)
    first, last = (int(n) for n in options.seeds.split(":"))
    start, failed, done = time.monotonic(), 0, 0
    kinds, counts = Counter[str](), Counter[str]()
    for seed in range(first, last):
        if time.monotonic() - start > 60 * options.minutes:
            break
        case, choices = make_case(seed, order=options.order, dtype=options.dtype)
        if options.having not in repr(case):
            continue
        kind, wrong = check(case)
        done, kinds, counts = done + 1, kinds + Counter([kind]), counts + Counter(list(choices))
        if wrong:
            failed += 1
            small, reason = shrink(case)
            print(f"seed {seed}: {reason}\n    {small}", flush=True)
    seconds = time.monotonic() - start
    print(f"{done} seeds in {seconds:.0f} s ({done / max(seconds, 1e-9):.0f} per second): {failed} failed;",
          ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))  # fmt: skip
    print("cases with", ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    return failed > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.exit(main())
