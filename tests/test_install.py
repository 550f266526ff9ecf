"""The switch: install, uninstall and the scope around it, and what must not change."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustkern as rk
from robustkern.double_backward import replaced_operators
from tests.cases import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent


def network(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.SiLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, 10), nn.GELU(), nn.Linear(10, 4),
    )  # fmt: skip
    return model.to(memory_format=layout)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype), torch.arange(6) % 4


def penalised(model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """The gradients after a step with a penalty, written as PyTorch's users write it."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = F.cross_entropy(model(x), y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        total = loss.mean() + grad.square().flatten(1).sum(1).mean()
    total.backward(inputs=tuple(model.parameters()))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def double_backward_node() -> str:
    """The name of the node that differentiates BatchNorm's backward."""
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    value = F.batch_norm(x, None, None, None, None, training=True)
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return grad.grad_fn.name()


STOCK = "NativeBatchNormBackwardBackward0"


def test_importing_changes_nothing():
    code = (
        "import robustkern, torch; from tests.test_install import double_backward_node; print(double_backward_node())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == STOCK


def test_install_and_uninstall_are_idempotent_and_exact():
    model, (x, y) = network(), batch()
    before = penalised(model, x, y)
    assert double_backward_node() == STOCK
    for _ in range(2):
        rk.install()
        rk.install()
        assert rk.is_installed()
        assert double_backward_node() != STOCK
        rk.uninstall()
        rk.uninstall()
        assert not rk.is_installed()
        assert double_backward_node() == STOCK
    after = penalised(model, x, y)
    for name in before:
        assert_same_bits(after[name], before[name])


def test_a_scope_ends_with_an_exception():
    def fail() -> None:
        with rk.fused_double_backward():
            assert double_backward_node() != STOCK
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert double_backward_node() == STOCK


def test_scopes_nest_and_leave_install_alone():
    with rk.fused_double_backward():
        with rk.fused_double_backward():
            pass
        assert double_backward_node() != STOCK
        assert not rk.is_installed()
    assert double_backward_node() == STOCK
    rk.install()
    with rk.fused_double_backward():
        pass
    assert double_backward_node() != STOCK


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_whole_network(layout):
    model, (x, y) = network(layout).double(), batch(torch.float64)
    x = x.contiguous(memory_format=layout)
    expected, without = penalised(model, x, y), plain(model, x, y)
    rk.install()
    actual = penalised(model, x, y)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-9 * value.norm(), name
    assert any((actual[name] - without[name]).norm() > 1e-6 for name in actual)  # the penalty counts


def test_a_plain_step_keeps_its_bits():
    """Where nothing is differentiated twice, PyTorch's own backward kernels run."""
    model, (x, y) = network(), batch()
    before = plain(model, x, y)
    rk.install()
    after = plain(model, x, y)
    for name in before:
        assert_same_bits(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype):
    model, (x, y) = network(), batch()
    exact = penalised(network().double(), x.double(), y)
    stock = penalised(model, x, y, autocast=dtype)
    rk.install()
    fused = penalised(model, x, y, autocast=dtype)
    total = sum(float(e.norm()) for e in exact.values())
    for name, value in exact.items():
        error, yardstick = ((g[name].double() - value).norm() for g in (fused, stock))
        assert error <= 2 * yardstick + 4 * torch.finfo(dtype).eps * total, name


def test_zeros_where_asked_for():
    """A parameter that a penalty does not depend on: None, or zeros as PyTorch gives."""

    def bias_gradient() -> Tensor | None:
        torch.manual_seed(0)
        first, second = nn.Linear(4, 5), nn.Linear(5, 3)
        x = torch.randn(2, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(second(F.relu(first(x))).sum(), x, create_graph=True)
        grad.square().sum().backward()
        assert first.weight.grad.norm() > 0
        return first.bias.grad

    assert torch.equal(bias_gradient(), torch.zeros(5))
    rk.install()
    assert bias_gradient() is None
    rk.install(materialize_zeros=True)
    assert torch.equal(bias_gradient(), torch.zeros(5))
    rk.install()
    assert bias_gradient() is None


def test_a_graph_keeps_its_zeros():
    """Whether zeros come back is settled where the graph is built, not where it runs."""
    x = torch.randn(2, 4, requires_grad=True)

    def built(**options: bool) -> Tensor:
        rk.install(**options)
        return torch.autograd.grad(F.relu(x), x, torch.ones_like(x).requires_grad_(), create_graph=True)[0]

    def grad_of(first: Tensor) -> Tensor | None:
        x.grad = None
        first.sum().backward()
        return x.grad

    with_zeros, without = built(materialize_zeros=True), built()
    assert grad_of(without) is None
    assert torch.equal(grad_of(with_zeros), torch.zeros_like(x))
    without = built()
    rk.install(materialize_zeros=True)
    assert grad_of(without) is None


def test_switching_in_many_threads():
    """Backward passes in some threads while others switch: every gradient is right."""
    model, (x, y) = network().double(), batch(torch.float64)
    expected = penalised(model, x, y)
    wrong: list[str] = []
    stop = threading.Event()

    def work(copy: nn.Module) -> None:
        try:
            for _ in range(10):
                with rk.fused_double_backward():
                    found = penalised(copy, x, y)
                wrong.extend(n for n, g in found.items() if not (g - expected[n]).norm() <= 1e-8 * expected[n].norm())
        except Exception as error:  # an exception in a thread would go unnoticed
            wrong.append(repr(error))

    def switch() -> None:
        while not stop.is_set():
            rk.install()
            rk.uninstall()

    workers = [threading.Thread(target=work, args=(network().double(),)) for _ in range(3)]
    switcher = threading.Thread(target=switch)
    for thread in (*workers, switcher):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    switcher.join()
    assert not wrong
    assert double_backward_node() == STOCK


def test_penalties_fuse_by_themselves():
    """Without install(), a loss of robustkern's builds fused graphs, and leaves nothing behind."""
    model, (x, y) = network(), batch()
    nodes: set[str] = set()

    def collect(node: torch.autograd.graph.Node | None) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            nodes.add(node.name())
            for following, _ in node.next_functions:
                collect(following)

    seen: set[torch.autograd.graph.Node] = set()
    terms = rk.losses.GradientPenalty(1.0)(model, x, y)
    collect(terms.smoothness.grad_fn)
    assert STOCK not in nodes
    assert "ConvolutionBackwardBackward0" not in nodes
    assert double_backward_node() == STOCK


def test_the_replaced_operators_are_listed():
    names = replaced_operators("cpu")
    assert {"aten::convolution_backward", "aten::native_batch_norm_backward"} <= set(names)
    assert names == sorted(names)
    assert set(replaced_operators("cuda")) <= set(names)


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist, torch.nn.functional as F
import robustkern as rk
import torch._dynamo  # imported later it would hold the group, whose threads abort at the exit
from tests.test_install import batch, network
rank = int(sys.argv[1])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo")
def gradients():
    model = torch.nn.parallel.DistributedDataParallel(network().double().eval())
    x, y = (t[rank * 3 : rank * 3 + 3] for t in batch(torch.float64))
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (loss.mean() + grad.square().flatten(1).sum(1).mean()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])
stock = gradients()
rk.install()
fused = gradients()
both = [torch.empty_like(fused) for _ in range(2)]
dist.all_gather(both, fused)
assert torch.equal(*both) and stock.norm() > 0
assert (fused - stock).norm() <= 1e-9 * stock.norm()
print("agree")
dist.destroy_process_group()
"""


@pytest.mark.long
def test_distributed_data_parallel(tmp_path):
    """Two processes: the gradients that DistributedDataParallel averages are stock's."""
    script = tmp_path / "worker.py"
    script.write_text(DISTRIBUTED)
    port = str(20000 + os.getpid() % 20000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), port], env=environment, cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert all("agree" in output for output in outputs)
