"""What can be shown of the CUDA half on a machine without a device, against a PyTorch built for CUDA.

Without a driver: the modules load, every operator has a CUDA kernel, and every replacement stands at AutogradCUDA, with
PyTorch's own kernel at AutogradOther.  On the null GPU (tests/null_gpu), where nothing is computed: second derivatives
of PyTorch's operators reach robustkern's, for real tensors and for fake ones; every operator's launches are such as a
device accepts, on the stream and device of its tensors; steps and attacks wait for nothing and can be recorded.

Prints a line for each thing that it looked at, with X before what is wrong, and exits with 1 if anything is.

Usage: cuda_without_device.py [PART ...]; by default all parts.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import robustkern as rk  # noqa: E402
from null_gpu import build, record  # noqa: E402
from robustkern import _late, _library, attacks, models  # noqa: E402
from robustkern._graph import graph_nodes  # noqa: E402
from robustkern.double_backward import folds, replaced_operators  # noqa: E402

Finding = tuple[str, bool, str]  # what was looked at, whether it is right, what was found
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ------------------------------------------------------------------ without a driver


def loading() -> Iterator[Finding]:
    missing = _library.why_unavailable() or _library.aten_why_unavailable() or _library.cuda_why_unavailable()
    seen = "sees a device" if torch.cuda.is_available() else "sees no device"
    yield "modules load", missing is None, missing or f"PyTorch {torch.__version__} {seen}"
    held = _library.architectures()
    yield "code", bool(held), " ".join(held)


def operators() -> Iterator[Finding]:
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text())
    without = [s for s in schemas if not torch._C._dispatch_has_kernel_for_dispatch_key(f"robustkern::{s}", "CUDA")]
    yield (
        "operators",
        not without,
        f"{len(schemas) - len(without)} of {len(schemas)} have a CUDA kernel{_list(without)}",
    )


def dispatch_tables() -> Iterator[Finding]:
    names = replaced_operators("cuda")
    wrong = [name for name in names if not _is_replaced(name)]
    yield (
        "replacements",
        bool(names) and not wrong,
        (f"{len(names) - len(wrong)} of {len(names)} at AutogradCUDA, PyTorch's own at AutogradOther{_list(wrong)}"),
    )
    cpu_only = sorted(set(replaced_operators("cpu")) - set(names))
    yield "replacements of the CPU alone", True, ", ".join(cpu_only) or "none"


def _is_replaced(name: str) -> bool:
    rows = dict(line.split(": ", 1) for line in torch._C._dispatch_dump_table(name).splitlines() if ": " in line)
    return "csrc/aten/" in rows["AutogradCUDA"] and "csrc/aten/" not in rows["AutogradOther"]


def _list(names: Iterable[str]) -> str:
    return "".join(f"; not {name}" for name in names)


# ------------------------------------------------------------------ second derivatives of PyTorch's operators


class Reached(TorchDispatchMode):
    """The operators of robustkern that are called, with what each asks of the null GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.called = Counter[str]()
        self.launches = Counter[str]()
        self.waiting: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "robustkern":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        self.called[name] += 1
        with record.recording() as asked:
            result = func(*args, **(kwargs or {}))
        self.launches[name] += len(asked.ours)
        if asked.waits:
            self.waiting.add(name)
        return result


def attention(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


IMAGES, TOKENS = (4, 16, 24, 24), (2, 64, 3 * 2 * 64)
NARROW, BOTH = ("bfloat16",), ("float32", "bfloat16")
# Name: what makes the function, the shape of its input, dtypes, the operator that must be called, PyTorch's own node
CASES: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], tuple[int, ...], tuple[str, ...], str, str]] = {
    "BatchNorm": (lambda: nn.BatchNorm2d(16), IMAGES, BOTH, "batch_norm_double_backward", "BatchNormBackward0"),
    "BatchNorm, eval": (
        lambda: nn.BatchNorm2d(16).eval(), IMAGES, BOTH, "batch_norm_double_backward", "BatchNormBackward0"
    ),
    "LayerNorm": (lambda: nn.LayerNorm(384), TOKENS, BOTH, "layer_norm_double_backward", "NativeLayerNormBackward0"),
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), IMAGES, BOTH, "group_norm_double_backward", "NativeGroupNormBackward0"),
    "GELU": (nn.GELU, TOKENS, BOTH, "activation_double_backward", "GeluBackward0"),
    "softmax": (lambda: nn.Softmax(-1), TOKENS, BOTH, "softmax_double_backward", "SoftmaxBackward0"),
    "attention, flash": (
        lambda: attention(SDPBackend.FLASH_ATTENTION), TOKENS, NARROW, "attention_double_backward",
        "ScaledDotProductFlashAttentionBackward0",
    ),
    "attention, efficient": (
        lambda: attention(SDPBackend.EFFICIENT_ATTENTION), TOKENS, BOTH, "attention_double_backward",
        "ScaledDotProductEfficientAttentionBackward0",
    ),
    "attention, cuDNN": (
        lambda: attention(SDPBackend.CUDNN_ATTENTION), TOKENS, NARROW, "attention_double_backward",
        "ScaledDotProductCudnnAttentionBackward0",
    ),
}  # fmt: skip


@contextmanager
def made_of(dtype: str) -> Iterator[None]:
    """What is made inside a with statement lies on the device, in this precision."""
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


# What torch.compile traces is left to PyTorch's formulas here: Inductor fuses them with their neighbours.
COMPOSED_WHEN_TRACED = ("GELU", "softmax")


def _second_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    value = function(x).float().square().sum()
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    grad.float().square().sum().backward()


def second_derivatives(fake: bool) -> Iterator[Finding]:
    kind = "fake" if fake else "real"
    for name, (make, shape, dtypes, operator, node) in CASES.items():
        for dtype in dtypes:
            with FakeTensorMode() if fake else nullcontext(), made_of(dtype):
                function, x = make(), torch.randn(shape, requires_grad=True)
                stock = next((n.name() for n in graph_nodes(function(x)) if n.name().endswith(node)), None)
                with record.recording() as asked, rk.fused_double_backward(), Reached() as reached:
                    _second_derivative(function, x)
            launches = 0 if fake else reached.launches[operator]
            ours = operator == "attention_double_backward"  # which is made of PyTorch's matrix products
            expected = not (fake and name in COMPOSED_WHEN_TRACED)
            right = reached.called[operator] == expected and bool(stock) and not asked.waits and not reached.waiting
            right &= fake or ours or launches > 0
            what = f"{stock}, then {dict(reached.called)}" + (f", {launches} launches" if launches else "")
            yield f"{kind} {name}, {dtype}", right, what


def forward_mode(fake: bool) -> Iterator[Finding]:
    """Attention's value and tangent, and the gradients of both in its input."""
    kind = "fake" if fake else "real"
    for name, (make, shape, dtypes, _, _) in CASES.items():
        for dtype in dtypes if name.startswith("attention") else ():
            with FakeTensorMode() if fake else nullcontext(), made_of(dtype):
                function, x = make(), torch.randn(shape, requires_grad=True)
                with record.recording() as asked, rk.fused_double_backward(), Reached() as reached:
                    value, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
                    torch.autograd.grad(value.float().sum() + tangent.float().square().sum(), x)
            expected = {"attention_jvp": 1, "attention_double_backward": 1}
            right = reached.called == expected and not asked.waits and not reached.waiting
            yield f"{kind} forward mode of {name}, {dtype}", right, f"{dict(reached.called)}"


def replaced() -> Iterator[Finding]:
    """Every case of every replaced operator, differentiated twice in all of its inputs and its cotangent."""
    for module in sorted(pkgutil.iter_modules([str(ROOT / "tests" / "installed")]), key=lambda m: m.name):
        failed: Counter[str] = Counter()
        with record.recording() as asked, rk.fused_double_backward(), Reached() as reached:
            cases = importlib.import_module(f"tests.installed.{module.name}").CASES
            for case in cases:
                for dtype in (torch.float64, torch.float32, *([torch.bfloat16, torch.float16] if case.half else [])):
                    try:
                        _every_derivative(case.function, [t.cuda().requires_grad_() for t in case.inputs(dtype)])
                    except Exception as error:
                        failed[f"{case}, {dtype}: {str(error).splitlines()[0]}"] += 1
        right = not failed and not asked.refused and not reached.waiting
        found = f"{len(cases)} cases, {len(asked.ours)} launches of ours"
        yield f"replaced {module.name}", right, "; ".join([found, *failed, *sorted(reached.waiting)])


def _every_derivative(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    value = function(*inputs)
    cotangent = torch.ones_like(value, requires_grad=True)
    first = torch.autograd.grad(value, inputs, cotangent, create_graph=True)
    total = torch.stack([g.sum() for g in first]).sum() + value.sum()
    torch.autograd.grad(total, (*inputs, cotangent), allow_unused=True)


def several_cotangents() -> Iterator[Finding]:
    for dtype in BOTH:
        with made_of(dtype):
            layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
            model, x = nn.Sequential(*layers), torch.randn(8, 3, 32, 32, requires_grad=True)
        stock = {n.name() for n in graph_nodes(model(x)) if "BatchNorm" in n.name()}
        with rk.fused_double_backward():
            outputs = model(x)
            yield f"several cotangents, {dtype}", folds(outputs, x, 4), f"{', '.join(stock)} in one backward pass"


# ------------------------------------------------------------------ launches


def launches() -> Iterator[Finding]:
    """Every operator's samples, on a stream of the second device while the first is the current one."""
    from benchmarks.exercise import OPERATORS, calls

    stream = torch.cuda.Stream("cuda:1")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for operator in OPERATORS:
        kernels, samples, refused, astray = Counter[str](), 0, 0, 0
        with torch.cuda.stream(stream), torch.cuda.device(0), Reached() as reached:
            for dtype in dtypes:
                for _, call in calls(operator, "cuda:1", dtype):
                    samples += 1
                    with record.recording() as asked:
                        call(False)
                    refused += len(asked.refused)
                    kernels.update(launch.kernel for launch in asked.ours)
                    astray += sum((la.device, la.stream) != (1, stream.cuda_stream) for la in asked.ours)
        right = samples > 0 and not refused and not astray and not reached.waiting
        wrong = f", {refused} refused, {astray} astray, waits in {sorted(reached.waiting)}" if not right else ""
        yield f"launches of {operator}", right, f"{samples} samples, {kernels.total()} of {len(kernels)} kernels{wrong}"


# ------------------------------------------------------------------ steps

Step = Callable[[Tensor, Tensor], Any]


def _plain(model: nn.Module) -> Step:
    return lambda x, y: F.cross_entropy(model(x), y).backward()


def _penalised(model: nn.Module) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        x = x.clone().requires_grad_()
        losses = F.cross_entropy(model(x), y, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        (losses.mean() + grad.flatten(1).norm(dim=1).mean()).backward(inputs=list(model.parameters()))

    return step


def _penalised_by_pytorch(model: nn.Module) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the one that PyTorch differentiates twice
            _penalised(model)(x, y)

    return step


def _loss(model: nn.Module, loss: Callable[..., Any]) -> Step:
    return lambda x, y: loss(model, x, y).backward(inputs=list(model.parameters()))


def _attack(model: nn.Module, attack: attacks.PGD | attacks.FGSM) -> Step:
    return lambda x, y: attack(model, x, y)


# Name: what makes the step, whether replacements are in force, whether it is ours
STEPS: dict[str, tuple[Callable[[nn.Module], Step], bool, bool]] = {
    "plain step": (_plain, False, False),
    "penalised step, PyTorch's": (_penalised_by_pytorch, False, False),
    "penalised step": (_penalised, True, True),
    "GradientPenalty": (lambda model: _loss(model, rk.losses.GradientPenalty()), True, True),
    "AdversarialTraining": (lambda model: _loss(model, rk.losses.AdversarialTraining()), True, True),
    "FGSM": (lambda model: _attack(model, attacks.FGSM(8 / 255)), True, True),
    "PGD, ten steps": (lambda model: _attack(model, attacks.PGD(8 / 255, steps=10)), True, True),
    "PGD, l2": (lambda model: _attack(model, attacks.PGD(0.5, steps=10, norm="l2")), True, True),
}


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    from benchmarks.step_models import ViT

    x = torch.rand(8, 3, 32, 32).cuda()  # copied there: what a device would compute is whatever lay in its memory
    yield "ResNet-18", models.create("preact-resnet18", 10, (3, 32, 32)).cuda(), x
    yield "ViT", ViT((3, 32, 32), 4, 192, 4, 3).cuda(), x


def steps() -> Iterator[Finding]:
    y = torch.zeros(8, dtype=torch.int64).cuda()
    for network, model, x in networks():
        for narrow in (False, True):
            images = x.contiguous(memory_format=torch.channels_last) if narrow else x
            for name, (make, installed, ours) in STEPS.items():
                label = f"{name}, {network}{', bfloat16' if narrow else ''}"
                step = make(model)

                def run(images: Tensor, step: Step = step, narrow: bool = narrow) -> Any:
                    with torch.autocast("cuda", torch.bfloat16) if narrow else nullcontext():
                        result = step(images, y)
                    _late._open.clear()  # checks of numbers that nobody has computed
                    return result

                with rk.fused_double_backward() if installed else nullcontext():
                    run(images)  # makes gradients, handles and workspaces
                    model.zero_grad()
                    with record.recording() as asked:
                        run(images)
                    found = f"{len(asked.launches)} launches, {len(asked.ours)} ours, {len(asked.library)} of libraries"
                    waits = Counter(asked.waits)
                    found += "".join(f", {n} x {function}" for function, n in waits.items()) or ", no wait"
                    yield label, not asked.refused and not (ours and waits), found
                    if ours:
                        yield _recorded(f"graph of {label}", run, images)


def _recorded(label: str, run: Callable[[Tensor], Any], x: Tensor) -> Finding:
    graphed = rk.graphed(run, warmup=1)
    graphed(x)
    with record.recording() as asked:
        graphed(x)
    replays = asked.other.count("replay")
    found = graphed.why_not or f"{len(asked.launches)} launches in one"
    return label, graphed.recordings == replays == 1 and graphed.why_not is None, found


# ------------------------------------------------------------------ the program

PARTS: dict[str, Callable[[], Iterator[Finding]]] = {
    "loading": loading,
    "operators": operators,
    "dispatch": dispatch_tables,
    # On the null GPU: autograd has no thread for a device that is not there.
    "fake": lambda: second_derivatives(fake=True),
    "real": lambda: second_derivatives(fake=False),
    "fake-forward": lambda: forward_mode(fake=True),
    "real-forward": lambda: forward_mode(fake=False),
    "replaced": replaced,
    "cotangents": several_cotangents,
    "launches": launches,
    "steps": steps,
}
ON_THE_NULL_GPU = ("fake", "real", "replaced", "cotangents", "launches", "steps")


def show(part: str) -> int:
    """Prints the findings of a part; how many are wrong."""
    wrong = 0
    try:
        for what, right, found in PARTS[part]():
            wrong += not right
            print(f"{' ' if right else 'X'} {what:58s} {found}", flush=True)
    except Exception as error:
        wrong += 1
        print(f"X {part}: {type(error).__name__}: {error}", flush=True)
        if os.environ.get("TRACEBACK"):
            raise
    return wrong


def main() -> int:
    asked = sys.argv[1:] or list(PARTS)
    if unknown := sorted(set(asked) - set(PARTS)):
        sys.exit(f"cuda_without_device.py: no part {unknown[0]}: choose among {' '.join(PARTS)}")
    if torch.version.cuda is None or _library.cuda_extension() is None:
        print(f"cuda-dispatch: skipped: {_library.cuda_why_unavailable()}")
        return 0
    if record.is_there():
        return min(sum(map(show, asked)), 1)
    wrong = sum(show(part) for part in asked if part not in ON_THE_NULL_GPU)
    if rest := [part for part in asked if part in ON_THE_NULL_GPU]:
        environment = {**os.environ, **build.environment(), "NULL_GPU_DEVICES": "2"}
        wrong += subprocess.run([sys.executable, __file__, *rest], env=environment).returncode != 0
    print(f"cuda-dispatch: {'something is wrong, see X' if wrong else 'all is right'}; no device, nothing was computed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
