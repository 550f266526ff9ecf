"""Random networks and ways to differentiate them, in Python's own words: what tests/fuzz_networks.py runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from tests import composites

Shape = tuple[int, ...]
Random = random.Random


@dataclasses.dataclass(frozen=True)
class Case:
    """One network, its input and how it is differentiated; its repr is the recipe."""

    seed: int = 0  # seed of the values
    dtype: str = "float64"
    shape: Shape = (2, 4)
    layout: str = "contiguous"
    layers: tuple[str | int, ...] = ()  # modules or expressions of x; a number is that layer once more
    loss: str = "y.square().sum()"
    how: str = "grad"
    order: int = 2
    reduce: str = "square"  # how the gradients make the scalar that is differentiated next
    features: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        default = vars(Case())
        return f"Case({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k == 'seed' or v != default[k])})"

    def without(self, *features: str) -> Case:
        return dataclasses.replace(self, features={k: v for k, v in self.features.items() if k not in features})


# ---------------------------------------------------------------- what layers are made of


class Fn(nn.Module):
    """An expression of x and of parameters of the shapes given; None stays None."""

    def __init__(self, text: str, **shapes: Shape | None) -> None:
        super().__init__()
        self.text, self.names = text, list(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.rand(shape)))

    def forward(self, x: Tensor) -> Tensor:
        function = compiled(f"lambda {', '.join(['x', *self.names])}: {self.text}")
        return function(x, *(getattr(self, name) for name in self.names))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Attention(nn.Module):
    """Attention of [N, T, D] to its last `keys` positions, in groups of heads; `mask`: None, bool, float or learned."""

    def __init__(self, size: int, heads: int, groups: int, keys: int, mask: str | None, causal: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.keys, self.mask, self.causal = heads, groups, keys, mask, causal
        self.q, self.k, self.v = (nn.Linear(size, n * (size // heads)) for n in (heads, groups, groups))
        self.learned = nn.Parameter(torch.zeros(16, 16)) if mask == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        past, heads = x[:, -self.keys :], (self.heads, self.groups, self.groups)
        projected = self.q(x), self.k(past), self.v(past)
        q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in zip(projected, heads))
        shape = x.shape[1], past.shape[1]
        mask = None if self.learned is None else self.learned[: shape[0], : shape[1]].to(q.dtype)
        if self.mask in ("bool", "float"):
            mask = torch.arange(math.prod(shape)).view(shape) % 3 != 1
            mask = mask if self.mask == "bool" else torch.zeros(shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
        options = {"enable_gqa": True} if self.groups != self.heads else {}
        return F.scaled_dot_product_attention(q, k, v, mask, 0, self.causal, **options).transpose(1, 2).flatten(2)


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

    jvp = backward


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
        inner_args, inner_kwargs = tree_map_only(AtenOnly, lambda t: t.inner, (args, kwargs or {}))
        result = tree_map_only(Tensor, AtenOnly, func(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(func, args, kwargs or {}, result)


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


def listed(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\n", "; ").split("; ") if line.strip()]


SMOOTH = listed("""F.gelu(x); F.gelu(x, approximate='tanh'); F.silu(x); F.mish(x); F.softplus(x); F.softplus(x, 2, 1.5)
    F.elu(x, 0.7); F.celu(x, 0.7); F.selu(x); F.hardswish(x); x.tanh(); x.sigmoid(); F.logsigmoid(x); F.softsign(x)""")
PIECEWISE = listed("""F.relu(x); F.relu6(3 * x); F.leaky_relu(x, 0.2); F.hardtanh(x, -0.4, 0.6); F.hardsigmoid(2 * x)
    F.hardshrink(x, 0.3); F.softshrink(x, 0.3); F.threshold(x, 0.1, 0.5); F.rrelu(x); nn.PReLU()""")
OVERWRITING = listed("""F.silu(x, inplace=True); F.mish(x, inplace=True); F.silu(x[:, :1], inplace=True)
    F.elu(x, inplace=True); F.celu_(x); F.selu_(x); F.relu(x, inplace=True); F.relu6(x, inplace=True); x.tanh_()
    F.leaky_relu(x, 0.1, inplace=True); F.hardtanh_(x); F.hardswish(x, inplace=True); F.hardsigmoid(x, inplace=True)
    F.threshold_(x, 0.1, 0.5); x.sigmoid_(); x.mul_(1.5); x.add_(0.5); F.mish(x.sigmoid(), inplace=True)
    F.silu(x.tanh(), inplace=True)""")
VIEWS = listed("""x.transpose(1, -1); x.mT.contiguous().mT; x.flatten(1); x[:, ::2]; x[..., 1:]; x[:1].expand(x.shape)
    x.movedim(1, -1).contiguous().movedim(-1, 1); x.sum(1, keepdim=True).expand(x.shape); torch.cat([x, 2 * x], 1)
    torch.stack(x.unbind(1)[::-1], 1); x.chunk(2, 1)[0]; x.split(1, 1)[-1]; x.flip(1); x.roll(1, -1)
    x.unsqueeze(0).squeeze(0); x.reshape(x.shape[0], -1, 1); x.reshape(x.shape[0], -1, x.shape[1])
    x.amax(1, keepdim=True) + x; torch.stack([x, x], -1)[..., 0]; x.repeat(1, 2, *[1] * (x.dim() - 2))
    x.contiguous(memory_format=torch.channels_last)""")
GATES = listed("""x + Stop.apply(x); Stop.apply(2 * x) + x.sin(); Stop.apply(F.silu(x)) + x; x * x.detach()
    x.detach() + x; Stop.apply(x); torch.where(x > 0, x, Stop.apply(x)); torch.cat([x, Stop.apply(x)], 1)""")
FILLERS = listed("2 * x; x * x; x.sin(); x + 0.5; x.exp().log1p(); F.normalize(x, dim=1, eps=0.1); x - x.mean(1, True)")


def maybe(r: Random, probability: float = 0.5) -> bool:
    return r.random() < probability


def divisor(r: Random, n: int) -> int:
    return r.choice([d for d in range(1, n + 1) if n % d == 0])


def spatial(s: Shape) -> int:
    """The number of dimensions of an image; 0 if s is not one."""
    return len(s) - 2 if 3 <= len(s) <= 5 else 0


def convolution(r: Random, s: Shape) -> str | None:
    d, c, k = spatial(s), s[1], r.choice([1, 2, 3])
    groups = divisor(r, c)
    options = f"stride={r.choice([1, 1, 2])}, dilation={r.choice([1, 1, 2])}, groups={groups}, bias={maybe(r, 0.7)}"
    if not d:
        return None
    if maybe(r, 0.3):
        return f"nn.ConvTranspose{d}d({c}, {groups * r.choice([1, 2])}, {k}, padding={r.randrange(2)}, {options})"
    mode = r.choice(["zeros", "zeros", "circular"])
    return f"nn.Conv{d}d({c}, {groups * r.choice([1, 2, 3])}, {k}, padding={k // 2}, padding_mode={mode!r}, {options})"


def depthwise(r: Random, s: Shape) -> str | None:
    d, c, k = spatial(s), s[1], r.choice([3, 5, 7, 11])
    options = f"padding={k // 2}, groups={c}, bias={maybe(r)}"
    return f"nn.Conv{d}d({c}, {c * r.choice([1, 1, 2])}, {k}, {options})" if 1 <= d <= 2 else None


def one_of_two(r: Random, shape: Shape, weight: float = 0.5) -> str:
    """A weight or a bias alone."""
    return f"w={shape}, b=None" if maybe(r, weight) else f"w=None, b={shape}"


def batch_norm(r: Random, s: Shape) -> str | None:
    if maybe(r, 0.3):
        return f"Fn('F.batch_norm(x, None, None, w, b, True)', {one_of_two(r, s[1:2])})"
    options = f"affine={maybe(r, 0.7)}, track_running_stats={maybe(r, 0.7)}"
    return f"nn.BatchNorm{max(1, len(s) - 2)}d({s[1]}, {options}){r.choice(['', '', '.eval()'])}"


def instance_norm(r: Random, s: Shape) -> str | None:
    options = f"affine={maybe(r, 0.7)}, track_running_stats={maybe(r, 0.3)}"
    return f"nn.InstanceNorm{spatial(s)}d({s[1]}, {options}){r.choice(['', '.eval()'])}" if spatial(s) else None


def group_norm(r: Random, s: Shape) -> str:
    groups, c, kind = divisor(r, s[1]), s[1], r.random()
    if kind < 0.3:
        return f"Fn('F.group_norm(x, {groups}, w, b)', {one_of_two(r, s[1:2], 0.8)})"
    if kind < 0.4:  # mean and rstd too have derivatives
        native = f"torch.native_group_norm(x.contiguous(), w, None, *x.shape[:2], {math.prod(s[2:])}, {groups}, 1e-5)"
        return f"Fn('sum(t.sum() for t in {native}) + x', w={(c,)})"
    return f"nn.GroupNorm({groups}, {c}, affine={maybe(r, 0.7)})"


def layer_norm(r: Random, s: Shape) -> str:
    shape = s[-r.randint(1, min(3, len(s) - 1)) :]
    if maybe(r, 0.1):
        return f"Fn('F.layer_norm(x, {shape}, None, b)', b={shape})"
    return f"nn.LayerNorm({shape}, elementwise_affine={maybe(r, 0.7)}, bias={maybe(r, 0.7)})"


def rms_norm(r: Random, s: Shape) -> str:
    shape = s[-r.randint(1, min(2, len(s) - 1)) :]
    return f"nn.RMSNorm({shape}, eps={r.choice(['1e-5', 'None'])}, elementwise_affine={maybe(r, 0.7)})"


def activation(r: Random, s: Shape) -> str:
    even = [d for d in range(1, len(s)) if s[d] % 2 == 0]
    if even and maybe(r, 0.1):
        return f"F.glu(x, {r.choice(even)})"
    return f"nn.PReLU({s[1]})" if maybe(r, 0.1) else r.choice(r.choices([SMOOTH, PIECEWISE, OVERWRITING], [4, 3, 2])[0])


def pooling(r: Random, s: Shape) -> str | None:
    d, k, size = spatial(s), r.choice([2, 3]), r.choice([1, 2, 3])
    options = f"{r.choice([1, 2])}, {r.choice([0, 1])}, ceil_mode={maybe(r)}"
    return d and r.choice(listed(
        f"""F.avg_pool{d}d(x, {k}, {options}, count_include_pad={maybe(r)}); F.max_pool{d}d(x, {k}, {options})
        F.max_pool{d}d(x, 2, 1, dilation=2, return_indices=True)[0]; F.adaptive_avg_pool{d}d(x, {size})
        F.adaptive_max_pool{d}d(x, {size})"""
    ))  # fmt: skip


def softmax(r: Random, s: Shape) -> str:
    return f"x.{r.choice(['softmax', 'log_softmax'])}({r.randrange(-1, len(s))})"


def attention(r: Random, s: Shape) -> str | None:
    if len(s) != 3 or s[1] > 16:
        return None
    if maybe(r, 0.2):
        options = f"activation={r.choice(['gelu', 'relu'])!r}, batch_first=True, norm_first={maybe(r)}"
        return f"nn.TransformerEncoderLayer({s[2]}, {divisor(r, s[2])}, 3, dropout=0, {options})"
    heads, causal = divisor(r, s[2]), maybe(r, 0.3)
    mask = None if causal else r.choice([None, "bool", "float", "learned"])
    return f"Attention({s[2]}, {heads}, {divisor(r, heads)}, {r.choice([s[1], s[1], 2])}, {mask!r}, {causal})"


def product(r: Random, s: Shape) -> str:
    d, n = s[-1], r.choice([1, 2, 3, 4])
    choices = [f"nn.Linear({d}, {n}, bias={maybe(r, 0.7)})"] * 3 + [f"Fn('x @ w', w={(d, n)})"]
    if len(s) == 2:
        choices += [f"Fn('torch.addmm(b, x, w)', w={(d, n)}, b={(n,)})", f"Fn('torch.mv(x, w)[:, None]', w={(d,)})"]
        choices += ["x @ x.t()"]
    if len(s) == 3:
        choices += ["torch.bmm(x, x.transpose(1, 2))", "torch.einsum('ntd,nsd->nts', x, x.tanh())"]
        choices += [f"Fn('torch.baddbmm(x, x, w.expand(x.shape[0], -1, -1))', w={(d, d)})"]
    return r.choice(choices)


def parameter(r: Random, s: Shape) -> str:
    """A weight that makes the cotangent depend on what is differentiated, a bias, or an embedding of positions."""
    return r.choice([f"Fn('x * w', w={s[1:]})", f"Fn('x + w', w={s[-1:]})",
                     f"Fn('x + F.embedding(torch.arange(x.shape[-2]) % 3, w)', w={(3, s[-1])})"])  # fmt: skip


def residual(r: Random, s: Shape) -> str | None:
    inner = LAYERS[r.choice(["batch_norm", "group_norm", "layer_norm", "rms_norm", "activation", "softmax"])][1](r, s)
    return f"Residual(make_layer({inner!r}))"


# name: (weight, what a random choice and the shape of x make of it)
LAYERS: dict[str, tuple[int, Callable[[Random, Shape], str | None]]] = {
    "convolution": (6, convolution),
    "depthwise": (2, depthwise),
    "batch_norm": (4, batch_norm),
    "instance_norm": (3, instance_norm),
    "group_norm": (4, group_norm),
    "layer_norm": (4, layer_norm),
    "rms_norm": (3, rms_norm),
    "activation": (10, activation),
    "pooling": (8, pooling),
    "softmax": (3, softmax),
    "attention": (5, attention),
    "product": (6, product),
    "parameter": (3, parameter),
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
    reduction = f"reduction={r.choice(['mean', 'sum'])!r}"
    text = "y.square().sum(); y.sin().sum(); y.sum(); y.exp().mean(); y.logsumexp(1).sum()\n"
    if s[1] > 1:
        text += f"""F.cross_entropy(y, labels(y), {reduction}); F.cross_entropy(y, y.detach().softmax(1), {reduction})
            F.cross_entropy(y, labels(y), torch.arange(1, {s[1] + 1}).to(y), ignore_index=0, label_smoothing=0.1)
            F.nll_loss(y.square(), labels(y), {reduction})
            F.cross_entropy(y, labels(y), reduction='none').square().sum()"""
    return r.choice(listed(text))


NAMES = ("x", "*.bias", "*.weight", "0.*", "1.*", "*.[bw]", "?.*")  # patterns of inputs and parameters
HOOKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "clone": (lambda t: t.detach().clone(), lambda t: t),
    "identity": (lambda t: t, lambda t: t),
    "numpy": (lambda t: (t.detach().double().numpy().copy(), t.dtype), lambda p: torch.from_numpy(p[0]).to(p[1])),
}

# name: (probability, what a random choice, the number of layers and the order make of it)
FEATURES: dict[str, tuple[float, Callable[[Random, int, int], Any]]] = {
    # a span of layers, and whether reentrant
    "checkpoint": (0.15, lambda r, n, k: (a := r.randrange(n), r.randint(a + 1, n), maybe(r, 0.2))),
    # around the forward, or everything
    "saved_tensors_hooks": (0.07, lambda r, n, k: (r.choice(list(HOOKS)), r.choice(["forward", "all"]))),
    "tensor_hook": (0.07, lambda r, n, k: r.randrange(n)),
    "module_hook": (0.07, lambda r, n, k: (r.randrange(n), r.choice(["forward", "backward", "backward_pre"]))),
    "autocast": (0.2, lambda r, n, k: "bfloat16"),  # of float32 only
    # need no gradient
    "frozen": (
        0.3,
        lambda r, n, k: r.choice([("x",), ("?.*",), ("*.bias",), ("*.weight",), ("0.*",), ("x", "*.weight")]),
    ),
    # parameters made in inference mode
    "inference": (0.03, lambda r, n, k: r.choice(["*.bias", "*.b", "*.weight"])),
    "nonleaf": (0.2, lambda r, n, k: r.choice(["x * 1.0", "x.view_as(x)", "x.clone()"])),
    # two forwards
    "twice": (0.1, lambda r, n, k: True),
    # between these, after the forward, or after the first backward
    "write": (0.12, lambda r, n, k: (r.choice(["between", "forward", "first"]), r.choice(NAMES))),
    # off, on, or in a scope: in the forward, and in one backward after the other
    "switch": (0.25, lambda r, n, k: "".join(r.choice("01s") for _ in range(k + 1))),
    "nonfinite": (0.08, lambda r, n, k: (r.choice(NAMES), r.choice(["inf", "nan"]))),
    # the last backward twice
    "retain": (0.1, lambda r, n, k: True),
    # which backward has several cotangents
    "batched": (0.2, lambda r, n, k: (r.choice(["vmap", "is_grads_batched"]), r.randint(1, k))),
    # the gradients that are differentiated again, without or with the loss
    "only": (0.3, lambda r, n, k: r.choice(NAMES)),
    "mixed": (0.2, lambda r, n, k: True),
    "subclass": (0.04, lambda r, n, k: True),
}
AUTOGRAD = {"grad": 10, "backward": 4}
FUNCTIONAL = {
    "func.grad": 2,
    "func.jvp": 1,
    "func.hessian": 1,
    "functional.hessian": 1,
    "forward_ad": 1,
    "make_fx": 0.15,
}
HOWS = AUTOGRAD | FUNCTIONAL


def pick(r: Random, weights: dict[Any, float]) -> Any:
    return r.choices(list(weights), list(weights.values()))[0]


def make_case(seed: int, **given: Any) -> tuple[Case, set[str]]:
    """The case of a seed, with the given dtype and order if any, and the names of the choices that made it."""
    r = Random(seed)
    batch, width = pick(r, {0: 0.3, 1: 2, 2: 6, 3: 3}), r.choice([1, 2, 3, 4, 4, 6])
    shapes = [(batch, width, *r.choice([(), (3,), (5,), (4,), (4, 4), (5, 3), (2, 3, 3), (3, 3, 2)]))]
    dtype = given.get("dtype") or pick(r, {"float64": 7, "float32": 2, "bfloat16": 0.7, "float16": 0.3})
    order = given.get("order") or pick(r, {1: 2, 2: 6, 3: 2})
    layers: list[str | int] = []
    kinds: list[str] = []
    x = torch.zeros(shapes[0])
    for _ in range(r.choice([1, 2, 3, 3, 4, 5, 6])):
        kind = pick(r, {name: weight for name, (weight, _) in LAYERS.items()})
        text = LAYERS[kind][1](r, tuple(x.shape))
        own = [i for i, made in enumerate(layers) if isinstance(made, str)]
        shared = r.choice(own) if own and maybe(r, 0.05) else None
        try:
            # Normalising one or two values gives zero or a sign, whose digits are right in float64 only.
            least = mock.patch.object(composites, "least", 1 if dtype == "float64" else 3)
            with torch.no_grad(), least, mock.patch.multiple(F, **composites.ALL):
                y = make_layer(text if shared is None else layers[shared])(x.clone()) if text else None
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue
        if y is not None and y.dim() >= 2 and y.numel() <= 500 and 0 not in y.shape[1:]:
            layers, kinds = (
                [*layers, text if shared is None else shared],
                [*kinds, kind if shared is None else "shared"],
            )
            x, shapes = y, [*shapes, tuple(y.shape)]
    layers = layers or ["F.gelu(x)"]

    how, dense = pick(r, HOWS), r.choice([1, 1, 1, 3])
    features = {name: make(r, len(layers), order) for name, (p, make) in FEATURES.items() if maybe(r, dense * p)}
    if dtype != "float32":
        features.pop("autocast", None)
    if how in FUNCTIONAL:
        features = {k: v for k, v in features.items() if k in ("nonfinite", "autocast", "frozen")}
    elif layers[0] in OVERWRITING:
        features.setdefault("nonleaf", "x * 1.0")
    if features.get("saved_tensors_hooks", ("",))[0] == "identity":
        features.pop("write", None)  # nothing would notice it
    if "checkpoint" in features and (how, order) != ("backward", 1):
        features["checkpoint"] = (*features["checkpoint"][:2], False)  # the other kind has no second derivative
    layout = pick(r, dict.fromkeys(LAYOUTS, 1) | {"contiguous": 3, "channels_last": 3 if len(shapes[0]) > 3 else 0})
    case = Case(seed, dtype, shapes[0], layout, tuple(layers), loss(r, shapes[-1]), how, order,
                r.choice(["square", "sin", "linear"]), features)  # fmt: skip
    if "nonfinite" in features and len(shapes) > 1 and maybe(r, 0.7):  # so that it does not spread to everything
        n = min(len(layers), r.choice([1, 1, 2]))
        ends = (*layers[:n], f"Fn('x * w', w={shapes[n][1:]})")
        case = dataclasses.replace(case, layers=ends, loss="y.sum()", reduce="linear")
    return case, {*kinds, *features, how, dtype, f"order {order}", layout, f"batch {batch}"}
