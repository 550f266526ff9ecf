"""Every text of docs/errors.md is what PyTorch says today, and its cure cures it."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import robustkern as rk

aten = torch.ops.aten
PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
TEXTS = re.findall(r"^\| `(.+?)` \| .* \| `(.+?)` \|$", PAGE, re.MULTILINE)
ATTENTION = {
    "flash_attention_for_cpu": aten._scaled_dot_product_flash_attention_for_cpu,
    "flash_attention": aten._scaled_dot_product_flash_attention,
    "efficient_attention": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True),
    "cudnn_attention": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True),
}


@pytest.fixture(autouse=True)
def switched_off():
    yield
    rk.uninstall()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def queries(name):
    """Tensors of the operator's device, the meta device in the place of CUDA."""
    device = "cpu" if name.endswith("cpu") else "meta"
    dtype = torch.float32 if name in ("flash_attention_for_cpu", "efficient_attention") else torch.float16
    return [torch.randn(2, 2, 16, 8, device=device, dtype=dtype) for _ in range(3)]


def twice(name):
    q, k, v = (t.requires_grad_() for t in queries(name))
    (grad,) = torch.autograd.grad(ATTENTION[name](q, k, v)[0].sum(), q, create_graph=True)
    grad.float().square().sum().backward()


def forwards(name):
    q, k, v = queries(name)
    torch.func.jvp(lambda q: ATTENTION[name](q, k, v)[0], (q,), (q,))


def hardsigmoid():
    x = torch.randn(4, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(F.hardsigmoid(x).sum(), x, create_graph=True)
    grad.square().sum().backward()


def batch_norm(cured):
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    if cured:
        return rk.jacobian_norm(network()(x), x, 3).mean().backward()
    return torch.func.vmap(torch.func.vjp(network(), x)[1])(torch.randn(5, 4, 3))


def compiled(cured):
    model, x = network(), torch.rand(4, 3, 8, 8, requires_grad=True)
    if not cured:
        (grad,) = torch.autograd.grad(torch.compile(model, backend="aot_eager")(x).sum(), x, create_graph=True)
        return grad.square().sum().backward()

    step = rk.compile(rk.losses.GradientPenalty(), model, backend="eager")
    step(x.detach(), torch.tensor([0, 1, 2, 0]))
    assert step.why_not is None and model[0].weight.grad.any()


def reentrant(cured):
    model, x = network(), torch.rand(4, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=not cured).sum(), x, create_graph=True)
    grad.square().sum().backward()


def sharded(cured):
    """FSDP2 on one process, which frees weights after a pass as it does on many."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), torch.rand(4, 6, requires_grad=True)
            if cured:
                step = rk.distributed.wrap(model, rk.losses.GradientPenalty(), shard=True)
                return step(x.detach(), torch.tensor([0, 1, 2, 0])).backward(inputs=step.parameters())
            mesh = init_device_mesh("cpu", (1,))
            for module in (model[0], model[2], model):
                fully_shard(module, mesh=mesh)
            (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return grad.square().sum().backward()
        finally:
            dist.destroy_process_group()


def case(text):
    """What raises the text; called with whether the cure is applied."""
    for name in sorted(ATTENTION, key=len, reverse=True):
        if f"_scaled_dot_product_{name}" in text:
            run = forwards if "forward AD" in text else twice
            return lambda cured: run(name) if name.endswith("cpu") or not cured else None  # no CUDA kernel runs on meta
    named = {"hardsigmoid": lambda cured: hardsigmoid(), "in-place operation": batch_norm, "aot_autograd": compiled,
             "use_reentrant": reentrant, "storage of size 0": sharded}  # fmt: skip
    return next(run for part, run in named.items() if part in text)


def test_the_page_has_rows():
    assert len(TEXTS) == 13


@pytest.mark.parametrize("text, cure", TEXTS, ids=[text[:90] for text, _ in TEXTS])
def test_pytorch_says_so_and_the_line_cures_it(text, cure):
    run = case(text)
    with pytest.raises(RuntimeError) as raised:
        run(False)
    assert text in str(raised.value).replace("`inputs`", "inputs")
    if cure == "robustkern.install()":
        rk.install()
    run(True)
