"""Random networks, differentiated to a random order in a random way: installed against stock against float64.

    python tests/fuzz_networks.py --seeds 0:2000 [--order 3] [--dtype float32] [--minutes 10] [--having GroupNorm]
    python tests/fuzz_networks.py --case "Case(...)"        # as it was printed

A seed makes a Case: layers and a loss in Python's own words, features (checkpoints, hooks, writes, ...) and a way to
differentiate.  It runs without robustkern, with `install()` and with `install(materialize_zeros=True)`.  Required:

* where PyTorch works, installed works and agrees: None is zero, or, with materialize_zeros, None where PyTorch's is;
* where PyTorch raises, installed raises or is right.  The truth is what float64 gives in elementary operators; if
  PyTorch lacks only the derivative of a replaced operator, installed must not raise either;
* errors in float32 and below, and differences in float64, are at most a few times PyTorch's own and those that one
  rounding after each layer makes;
* what is finite in PyTorch is finite.

A failing case is printed after every layer and feature has been removed that it fails without, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import math
import re
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

sys.path[:0] = [str(Path(__file__).parents[1])]

import robustkern as rk  # noqa: E402
from robustkern import _library  # noqa: E402
from tests import composites  # noqa: E402
from tests.random_networks import (  # noqa: E402
    AUTOGRAD,
    FUNCTIONAL,
    HOOKS,
    LAYOUTS,
    AtenOnly,
    Case,
    Shape,
    compiled,
    make_case,
    make_layer,
)

Results = dict[str, Tensor | None]


def matches(name: str, *patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


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


class Network(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.features, self.layers = case.features, nn.ModuleList()
        for text in case.layers:
            self.layers.append(self.layers[text] if isinstance(text, int) else make_layer(text))
        index, kind = self.features.get("module_hook", (0, ""))
        module = self.layers[index % len(self.layers)] if kind else nn.Identity()
        if kind == "forward":
            module.register_forward_hook(lambda m, inputs, output: output * 1.5)
        elif kind == "backward":
            module.register_full_backward_hook(lambda m, grads, _: tuple(None if g is None else g * 2 for g in grads))
        elif kind == "backward_pre":
            module.register_full_backward_pre_hook(lambda m, grads: (grads[0] * 2,))

    def span(self, h: Tensor, first: int, last: int) -> Tensor:
        for i, layer in enumerate(self.layers[first:last], first):
            h = layer(h)
            if self.features.get("tensor_hook") == i and h.requires_grad:
                h.register_hook(lambda g: None if g is None else g * 2)
            h = composites.rounded(h, i)
        return h

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.layers)
        first, last, reentrant = self.features.get("checkpoint", (n, n, False))
        x = self.span(x, 0, first)
        x = checkpoint(self.span, x, first, last, use_reentrant=reentrant) if first < min(last, n) else x
        return self.span(x, last, n)


class Run:
    """One execution of a case; `results` holds what it finds, by name.  `exact`: use the same values in float64."""

    def __init__(self, case: Case, mode: str | None = None, exact: bool = False) -> None:
        self.case, self.features, self.exact, self.results = case, case.features, exact, Results()
        self.switch, own = Switch(case, mode), getattr(torch, case.dtype)
        self.dtype = torch.float64 if exact else own
        torch.manual_seed(case.seed)
        self.net = Network(case)
        place, value = self.features.get("nonfinite", ("", "0"))
        frozen, inference = self.features.get("frozen", ()), self.features.get("inference", "")

        def valued(name: str, t: Tensor) -> Tensor:
            t = (t.double() + 0.5 * self.random(name, t.shape)).to(own).to(self.dtype)
            if matches(name, place) and t.numel():
                t.view(-1)[t.numel() // 2] = float(value)
            return t

        self.leaf = LAYOUTS[case.layout](valued("x", self.random("x0", case.shape))).detach()
        self.leaf = AtenOnly(self.leaf) if "subclass" in self.features else self.leaf
        self.named = {"x": self.leaf}
        self.net.to(self.dtype)
        for name, p in list(self.net.layers.named_parameters()):
            p.data = valued(name, p.data)
            if matches(name, inference):
                module, _, attribute = name.rpartition(".")
                with torch.inference_mode():
                    made = nn.Parameter(p.detach().clone(), requires_grad=False)
                self.net.layers.get_submodule(module)._parameters[attribute] = made
            else:
                self.named[name] = p
        self.wanted = {name: t.requires_grad_() for name, t in self.named.items() if not matches(name, *frozen)}
        for name in self.named.keys() - self.wanted.keys():
            self.named[name].requires_grad_(False)

    def __call__(self) -> Results:
        # As users get it in one case of four; else fused derivatives for tensors as small as these. Batches are not for
        # PyTorch's GroupNorm.
        always = self.case.seed % 4 > 0 or "batched" in self.features
        before = _library.aten_extension().however_small(always)
        with ExitStack() as stack:
            stack.callback(_library.aten_extension().however_small, before)
            stack.callback(self.switch.off)
            self.switch(0)
            self.by_autograd(stack) if self.case.how in AUTOGRAD else self.by_functions()
        self.results.update({f"buffer {name}": t for name, t in self.net.named_buffers()})
        plain = {name: t.inner if isinstance(t, AtenOnly) else t for name, t in self.results.items()}
        return {name: None if t is None else t.detach() for name, t in plain.items()}

    def random(self, name: str, shape: Shape) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.case.seed} {name}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def random_like(self, name: str, t: Tensor, *batch: int) -> Tensor:
        """A cotangent or a tangent, in another layout than t."""
        return LAYOUTS["reversed"](self.random(f"like {name}", (*batch, *t.shape))).to(t.dtype)

    def loss(self, x: Tensor) -> Tensor:
        autocast = self.features.get("autocast") if self.dtype == torch.float32 else None
        with torch.autocast("cpu", getattr(torch, autocast)) if autocast else nullcontext():
            return compiled(f"lambda y: {self.case.loss}")(self.net(x))

    def write(self, when: str) -> None:
        place, pattern = self.features.get("write", ("", ""))
        with torch.no_grad():
            for t in [t for name, t in self.named.items() if place == when and matches(name, pattern)]:
                t.mul_(1.25)

    def forward(self) -> Tensor:
        x = compiled(f"lambda x: {self.features.get('nonleaf', 'x')}")(self.leaf)
        total = self.loss(x)
        self.write("between")
        return total + self.loss(1.5 * x) if "twice" in self.features else total

    def objective(self, tensors: dict[str, Tensor]) -> Tensor:
        if self.case.reduce == "linear":
            return sum((t * self.random_like(name, t)).sum() for name, t in tensors.items())
        return sum((t.square() if self.case.reduce == "square" else t.sin()).sum() for t in tensors.values())

    def by_autograd(self, stack: ExitStack) -> None:
        kind, extent = self.features.get("saved_tensors_hooks", ("", ""))
        with ExitStack() as hooks:
            if kind:
                hooks.enter_context(saved_tensors_hooks(*HOOKS[kind]))
            total = self.results["loss"] = self.forward()
            if extent == "all":
                stack.enter_context(hooks.pop_all())
        self.write("forward")
        outputs = {"loss": total}
        for k in range(1, self.case.order + 1):
            self.switch(k)
            grads = self.backward(k, total, outputs) if total.requires_grad else dict.fromkeys(self.wanted)
            self.results.update({f"order {k} {name}": g for name, g in grads.items()})
            self.write("first" if k == 1 else "")
            chosen = {n: g for n, g in grads.items() if g is not None and matches(n, self.features.get("only", "*"))}
            outputs = {name: g for name, g in chosen.items() if g.requires_grad}
            total = torch.zeros(()) + self.objective(chosen) + (total if "mixed" in self.features else 0)

    def backward(self, k: int, total: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
        inputs, values, last = list(self.wanted.values()), list(outputs.values()), k == self.case.order
        batched, stage = self.features.get("batched", ("", 0))
        retain = not last or "retain" in self.features
        options: dict[str, Any] = {"create_graph": not last, "retain_graph": retain, "allow_unused": True}
        if stage == k and not outputs:
            return dict.fromkeys(self.wanted)
        if stage == k:
            cotangents, absent = [self.random_like(name, t, 2) for name, t in outputs.items()], []

            def pull(*cotangents: Tensor) -> tuple[Tensor, ...]:
                grads = torch.autograd.grad(values, inputs, cotangents, **options)
                absent[:] = [g is None for g in grads]
                return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads))

            if batched == "vmap":
                grads = torch.vmap(pull)(*cotangents)
                return {name: None if none else g for name, none, g in zip(self.wanted, absent, grads)}
            return dict(
                zip(self.wanted, torch.autograd.grad(values, inputs, cotangents, is_grads_batched=True, **options))
            )
        if last and self.case.how == "backward":
            for _ in range(2 if retain else 1):
                total.backward(retain_graph=retain)
            return {name: t.grad for name, t in self.wanted.items()}
        grads = torch.autograd.grad(total, inputs, **options)
        if last and retain:
            again = torch.autograd.grad(total, inputs, allow_unused=True)
            self.results.update({f"again {name}": g for name, g in zip(self.wanted, again)})
        return dict(zip(self.wanted, grads))

    def by_functions(self) -> None:
        names, args = list(self.wanted), tuple(t.detach() for t in self.wanted.values())
        if not args:
            return
        how, order, every = self.case.how, self.case.order, tuple(range(len(args)))
        leaves = [t.clone().requires_grad_() for t in args]

        def scalar(*values: Tensor) -> Tensor:
            given = dict(zip(names, values))
            x = given.pop("x", self.leaf.detach())
            with torch.nn.utils.stateless._reparametrize_module(self.net.layers, given):
                return self.loss(x)

        def of_first(x: Tensor) -> Tensor:
            return scalar(x, *args[1:])

        def norm(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
            return lambda *values: sum(g.sin().sum() for g in f(*values))

        def gradient(*values: Tensor, create_graph: bool = True) -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(scalar(*values), values, create_graph=create_graph, allow_unused=True)
            return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(values, grads))

        def differentiated(total: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
            return (
                torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else (None,) * len(inputs)
            )

        f = scalar
        for _ in range(order - 1):
            f = norm(torch.func.grad(f, every))
        if how == "func.grad":
            found = torch.func.grad(f, every)(*args)
        elif how == "func.jvp":
            tangents = tuple(self.random_like(name, t) for name, t in zip(names, args))
            found = torch.func.jvp(torch.func.grad(f if order < 3 else scalar, every), args, tangents)[1]
        elif how == "func.hessian":
            hessian = torch.func.hessian(of_first)
            found = (torch.func.grad(lambda x: hessian(x).sin().sum()) if order == 3 else hessian)(args[0])
        elif how == "functional.hessian":
            mode = "forward-mode" if self.case.reduce == "linear" and order < 3 else "reverse-mode"
            options = {"vectorize": True, "create_graph": order == 3, "outer_jacobian_strategy": mode}
            found = torch.autograd.functional.hessian(of_first, leaves[0], **options)
            found = differentiated(found.sin().sum(), leaves[:1]) if order == 3 else found
        elif how == "forward_ad":
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, self.random_like(name, t)) for name, t in zip(names, leaves)]
                found = tuple(forward_ad.unpack_dual(g).tangent for g in gradient(*duals, create_graph=order > 2))
        else:  # traced; outputs that the graph has saved are cut from it, so that only eager derivatives are right
            found = differentiated(norm(gradient if self.exact else make_fx(gradient)(*leaves))(*leaves), leaves)
        self.results.update(
            {f"{how} {name}": t for name, t in zip(names, found if isinstance(found, tuple) else (found,))}
        )


def contiguous_if_frozen(x: Tensor, *args: Any, group_norm: Any = F.group_norm) -> Tensor:
    """GroupNorm, whose backward crashes in PyTorch for channels_last images that need no gradient."""
    return group_norm(x if x.requires_grad else x.clone(memory_format=torch.contiguous_format), *args)


def attempt(case: Case, mode: str | None = None, functions: dict[str, Any] | None = None, exact: bool = False,
            noise: float = 0) -> Results | Exception:  # fmt: skip
    """What a run finds, or what it raises; `functions` replace those of torch.nn.functional."""
    functions = {"group_norm": contiguous_if_frozen} | (functions or {})
    try:
        with mock.patch.multiple(F, **functions), mock.patch.object(composites, "noise", noise):
            return Run(case, mode, exact)()
    except Exception as error:
        return error


# ---------------------------------------------------------------- judging


def norm(t: Tensor | None) -> float:
    return 0.0 if t is None else float(t.double().nan_to_num(0, 0, 0).norm())


def distance(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The distance where theirs is finite; None is zero."""
    if ours is None or theirs is None:
        return norm(ours) + norm(theirs)
    return norm(torch.where(torch.isfinite(theirs), ours.double() - theirs.double(), 0))


class Judge:
    """Compares installed with what is expected; float64 results are computed only where the two differ."""

    def __init__(self, case: Case) -> None:
        self.case, self.basis, self.expected, self.strict = case, "stock", attempt(case), True
        names = (getattr(torch, d) for d in (case.dtype, case.features.get("autocast", case.dtype)))
        self.eps = max(torch.finfo(dtype).eps for dtype in names)
        if isinstance(self.expected, Exception) and not {"write", "checkpoint"} <= set(case.features):
            # Installed must work if PyTorch lacks only the derivative of a replaced operator.
            lacking = "derivative for" in str(self.expected) and case.how in AUTOGRAD
            self.strict = lacking and not {"switch", "subclass", "write"} & set(case.features)
            self.case = case.without("write", "subclass")
            for self.basis, functions in ("stock with composites", composites.TWICE), ("composites", composites.ALL):
                self.expected = attempt(self.case, functions=functions)
                if not isinstance(self.expected, Exception):
                    break

    @property
    def of_stock(self) -> bool:
        """Whether some derivatives are PyTorch's own in any case."""
        third = self.case.order == 3 and {"checkpoint", "saved_tensors_hooks"} & set(self.case.features)
        # PyTorch's first backward of BatchNorm is wrong for one channels_last image in a view, as hooks make it.
        view = self.case.shape[0] == 1 and self.case.layout == "channels_last" and "batch_norm" in str(self.case)
        return "0" in self.case.features.get("switch", "") or bool(third) or view

    def in_float64(self, noise: float = 0) -> Results:
        for case in self.case, self.case.without("write"):  # autocast's copies hide the write
            found = attempt(case, functions=composites.ALL, exact=True, noise=noise)
            if not isinstance(found, Exception):
                return found
        return self.expected  # there is only PyTorch's own result

    @functools.cached_property
    def exact(self) -> Results:
        return self.in_float64()

    @functools.cached_property
    def roundings(self) -> list[Results]:
        return [self.in_float64(scale * self.eps) for scale in (1, -1, 0.7)]

    def judge(self, mode: str, ours: Results | Exception) -> tuple[str, str | None]:
        """What it was compared with, and what is wrong."""
        if isinstance(self.expected, Exception):
            return "both raise" if isinstance(ours, Exception) else "unverified", None
        if isinstance(ours, Exception):
            error = f"{type(ours).__name__}: {(str(ours).splitlines() or [''])[0][:140]}"
            composed = re.search("rms_?norm|group_?norm", str(self.case).lower())
            kept = "modified by an inplace operation" in error and composed
            # Where PyTorch has lost the derivative, it never reaches what it cannot do for several cotangents.
            lost = self.is_lossy and ("vmap" in error or self.case.how in FUNCTIONAL)
            if not self.strict or kept or lost or "a recorded derivative cannot be differentiated" in error:
                return "both raise", None  # PyTorch composes RMSNorm and GroupNorm, and keeps other tensors
            return self.basis, f"{mode}: raises where {self.basis} works: {error}"
        for name in self.expected:
            nones = mode == "zeros" and self.basis == "stock" and not self.loses(ours)
            wrong = self.compare(name, ours.get(name), nones)
            if wrong:
                return self.basis, f"{mode}: {name} {wrong}"
        if self.case.how in FUNCTIONAL and self.case.dtype == "float64":
            errors = [distance(t, self.exact.get(name)) / (1 + norm(t)) for name, t in ours.items()]
            return "as wrong as stock" if max(errors, default=0) > 1e-6 else self.basis, None
        return self.basis, None

    @property
    def is_lossy(self) -> bool:
        """Whether PyTorch finds None where there is something: for no samples, and for norms with a bias alone."""
        bias_alone = "w=None, b=(" in str(self.case) or "None, b)" in str(self.case)
        return self.case.shape[0] == 0 or bias_alone

    def loses(self, ours: Results) -> bool:
        """Whether PyTorch's None says nothing; that of GroupNorm, which it composes, differs between its versions."""
        return (
            self.is_lossy
            or bool(re.search("group_?norm", str(self.case).lower()))
            or any(t is None and norm(ours.get(name)) for name, t in self.expected.items())
        )

    def compare(self, name: str, ours: Tensor | None, nones: bool) -> str | None:
        theirs = self.expected[name]
        if nones and (ours is None) != (theirs is None) and not norm(ours) + norm(theirs):
            return f"is {'None' if ours is None else 'a tensor'}, stock's is {'None' if theirs is None else 'a tensor'}"
        if ours is not None and theirs is not None:
            if ours.shape != theirs.shape:
                return f"has shape {tuple(ours.shape)}, stock's {tuple(theirs.shape)}"
            if self.basis == "stock" and ours.dtype != theirs.dtype:
                return f"is {ours.dtype}, stock's {theirs.dtype}"
            lost = int((torch.isfinite(theirs) & ~torch.isfinite(ours)).sum())
            overflows = self.case.dtype == "float16" and "nonfinite" not in self.case.features
            # PyTorch's own kernels differ in whether an infinity meets the zeros of a padding, and, between vectors and
            # what is left over, in the slope of hardtanh at NaN.
            case, value = str(self.case), self.case.features.get("nonfinite", ("", ""))[1]
            either = ("Conv" in case and "padding=0" not in case and "inf" in value) or (
                "hardtanh" in case and value == "nan"
            )
            if lost and self.basis == "stock" and not overflows and not either:
                return f"is not finite in {lost} of {ours.numel()} places where stock is"
        order = name.rpartition(" ")[0]
        size = 1 + max(norm(t) for other, t in self.expected.items() if other.rpartition(" ")[0] == order)
        tolerance = size * (1e-9 if self.eps < 1e-9 else 16 * self.eps)
        apart = distance(ours, theirs)
        if apart <= tolerance:
            return None
        exact = self.exact.get(name)
        error, own_error = distance(ours, exact), distance(theirs, exact)
        # Include the lower orders: where a higher order is exactly zero, the rounded result of a kernel is not.
        names = [other for other in self.expected if other.rpartition(" ")[2] == name.rpartition(" ")[2]]
        lower = names[: names.index(name) + 1]
        noise = max(distance(run.get(n), self.exact.get(n)) for run in self.roundings for n in lower)
        # Formulas that PyTorch does not have may round terms that cancel, which elementary operators do not have.
        if error <= 4 * own_error + (30 if self.basis == "stock" else 1000) * noise + tolerance:
            return None
        third, short = self.case.order == 3, self.eps > 1e-9
        if self.basis != "stock" and (short or self.of_stock or (third and self.case.how in FUNCTIONAL)):
            return None  # in another precision than ours, or with derivatives of PyTorch's in the middle
        if (third or short) and self.exact is self.expected:
            return None  # no truth to compare with: PyTorch's third derivatives of most normalisations are wrong
        errors = f"installed {error:.2g}, {self.basis} {own_error:.2g}, roundings {noise:.2g}"
        return f"differs by {apart:.2g}, of {size:.2g}; errors: {errors}"


def check(case: Case) -> tuple[str, str | None]:
    """What a case was compared with, and what is wrong with it."""
    judge = Judge(case)
    for mode in "default", "zeros":
        ours = attempt(case, mode)
        if judge.case is not case and not isinstance(ours, Exception):
            ours = attempt(judge.case, mode)  # the expected result comes from the case without writes
        basis, wrong = judge.judge(mode, ours)
        if wrong:
            break
    if wrong and basis == "stock" and not reproducible(case):
        return "stock, which reads memory that nobody has written", None
    return basis, wrong


def reproducible(case: Case) -> bool:
    """Whether PyTorch finds the same again, whatever its memory held before."""

    def found(junk: float) -> Results | Exception:
        kept = [torch.full((n,), junk, dtype=torch.float64) for n in range(1, 200)]
        del kept
        return attempt(case)

    first, *others = (found(junk) for junk in (1e300, -1e300, math.nan, 1.0))
    if isinstance(first, Exception):
        return True
    return all(
        not isinstance(other, Exception)
        and all(t is None or torch.equal(t.nan_to_num(7), other[name].nan_to_num(7)) for name, t in first.items())
        for other in others
    )


def smaller(case: Case) -> Iterator[Case]:
    replace, plain = functools.partial(dataclasses.replace, case), Case()
    yield from (case.without(name) for name in case.features)
    yield from (replace(layers=case.layers[:i] + case.layers[i + 1 :]) for i in range(len(case.layers)))
    yield from (replace(**{name: getattr(plain, name)}) for name in ("how", "layout", "dtype", "reduce"))
    yield from (replace(order=order) for order in range(1, case.order))
    yield from (replace(loss=text) for text in ("y.sum()", plain.loss)[: 1 + (case.loss != "y.sum()")])
    states = case.features.get("switch", "")
    for i in range(len(states)):
        yield replace(features=case.features | {"switch": states[:i] + "1" + states[i + 1 :]})


def shrink(case: Case, seconds: float = 20) -> tuple[Case, str | None]:
    """The case without whatever it fails without, and how it fails then."""
    end, (_, wrong), tried = time.monotonic() + seconds, check(case), {repr(case)}
    while time.monotonic() < end:
        for candidate in smaller(case):
            if repr(candidate) in tried:
                continue
            tried.add(repr(candidate))
            if still := check(candidate)[1]:
                case, wrong = candidate, still
                break
        else:
            break
    return case, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:300", metavar="FIRST:LAST")
    parser.add_argument("--order", type=int, choices=(1, 2, 3))
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--having", default="", metavar="TEXT", help="only cases whose recipe has this text")
    parser.add_argument("--case", help="one case, as it was printed")
    options = parser.parse_args(arguments)
    if options.case:
        basis, wrong = check(eval(options.case))
        print(wrong or f"agrees ({basis})")
        return bool(wrong)
    start, failed = time.monotonic(), 0
    bases, counts = Counter[str](), Counter[str]()
    for seed in range(*map(int, options.seeds.split(":"))):
        case, choices = make_case(seed, order=options.order, dtype=options.dtype)
        if time.monotonic() - start > 60 * options.minutes:
            break
        if options.having not in repr(case):
            continue
        basis, wrong = check(case)
        bases[basis] += 1
        counts.update(choices)
        if wrong:
            failed += 1
            small, reason = shrink(case)
            print(f"seed {seed}: {reason}\n    {small}", flush=True)
    seconds = time.monotonic() - start
    speed = f"{bases.total()} seeds in {seconds:.0f} s ({bases.total() / max(seconds, 1e-9):.0f} per second)"
    print(f"{speed}: {failed} failed; compared with:", ", ".join(f"{name} {n}" for name, n in bases.most_common()))
    print("cases with", ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    return failed > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.exit(main())
