"""robustkern.distributed.wrap: every method's gradient in two processes, by DDP and by FSDP2, is that of one."""

import json
import traceback
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from processes import answers, fork

import robustkern as rk
from robustkern import data as datasets
from robustkern import losses
from robustkern.attacks import PGD
from robustkern.sharding import Shard
from robustkern.training import METHODS, build_loss
from robustkern.training.distributed import settle_imports

ROUNDING = 1e-6  # of float64, from images and their gradients, which are float32; as for whole runs


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + nn.functional.silu(self.conv(self.norm(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 8, 2, 2), nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x.double())).mean(dim=(2, 3)))


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network().double()


def loss_of(method):
    if method == "distillation":
        return losses.Distillation(network(1), 2.0)
    options = {"steps": 2} if "steps" in METHODS[method].options else {}
    return build_loss(method, options, eps=0.1, impl="auto")


CASES = {
    **{method: lambda method=method: loss_of(method) for method in METHODS},
    "awp": lambda: build_loss("trades", {"steps": 2, "awp": 0.01}, eps=0.1, impl="auto"),
    "half of each": lambda: build_loss("pgd", {"steps": 2, "weight": 0.5}, eps=0.1, impl="auto"),
    "finite differences": lambda: losses.GradientPenalty(estimator="finite-difference"),
}


def draw(step, shard=None):
    return rk.Draw(torch.Generator().manual_seed(3 + step), step, shard)


def gradients(model):
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def relative(mine, theirs):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, theirs, strict=True))


def compared(name, carrier, x, y, rank):
    """How far two steps' gradients are from one process's, relative to their length, and then an attack's images."""
    alone, model, loss = network(), network(), CASES[name]()
    mine = Shard.of(rank, 2, len(x))
    step = rk.distributed.wrap(model, loss, shard=carrier == "fsdp2")
    worst = 0.0
    sgd = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (alone, model)]
    for number in range(2):
        for optimizer in sgd:
            optimizer.zero_grad()
        loss(alone, x, y, draw(number)).backward(inputs=alone.parameters())
        terms = step(mine.rows(x), mine.rows(y), draw(number, mine))
        terms.backward(inputs=step.parameters())
        worst = max(worst, relative(gradients(model), gradients(alone)))
        for optimizer in sgd:
            optimizer.step()
    attack = PGD(0.1, steps=2)
    found, expected = (attack(m, x, y, torch.Generator().manual_seed(2)) for m in (model, alone))
    return max(worst, float((found - expected).abs().max()))


def accumulated(carrier, x, y, rank):
    """Two parts of each process's rows, of which the first sends nothing."""
    alone, model, loss = network(), network(), losses.GradientPenalty()
    step = rk.distributed.wrap(model, loss, shard=carrier == "fsdp2")
    mine = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
    (first, second), labels = x[mine].chunk(2), y[mine].chunk(2)
    with step.no_sync():
        (step(first, labels[0]).total / 2).backward(inputs=list(step.parameters()))
    (step(second, labels[1]).total / 2).backward(inputs=list(step.parameters()))
    loss(alone, x, y).backward(inputs=alone.parameters())
    return relative(gradients(model), gradients(alone))


def both_carriers(rank, x, y):
    settle_imports()
    torch.distributed.init_process_group("gloo")
    checks = {(name, carrier): partial(compared, name) for name in CASES for carrier in ("ddp", "fsdp2")}
    checks |= {("accumulated", carrier): accumulated for carrier in ("ddp", "fsdp2")}
    errors = {}
    for (name, carrier), check in checks.items():
        try:
            errors[f"{name}, {carrier}"] = check(carrier, x, y, rank)
        except Exception:
            errors[f"{name}, {carrier}"] = traceback.format_exc()
    torch.distributed.destroy_process_group()
    return json.dumps(errors)


@pytest.fixture(scope="module")
def batch():
    data = datasets.load("digits")
    return data.images[:16], data.labels[:16]


def test_every_method_by_ddp_and_by_fsdp2(tmp_path, batch):
    for answer in answers(tmp_path, fork(tmp_path, both_carriers, *batch)):
        errors = json.loads(answer)
        assert len(errors) == 2 * (len(CASES) + 1)
        assert {case: error for case, error in errors.items() if not isinstance(error, float) or error > ROUNDING} == {}


def test_alone_it_is_the_loss(batch):
    model, loss = network(), losses.GradientPenalty()
    step = rk.distributed.wrap(model, loss, shard=True)
    with step.no_sync():
        assert torch.equal(step(*batch).total, loss(model, *batch).total)
    assert list(step.parameters()) == list(model.parameters())


@pytest.mark.parametrize("options", [{"static_graph": True}, {"shard": True, "reshard_after_forward": True}])
def test_options_that_give_wrong_gradients_are_refused(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]} must be False"):
        rk.distributed.wrap(network(), losses.CrossEntropy(), **options)


def test_only_a_bare_module_is_wrapped():
    with pytest.raises(TypeError, match="model must be a module that nothing wraps yet, got function"):
        rk.distributed.wrap(lambda x: x, losses.CrossEntropy())
    with pytest.raises(TypeError, match="loss must be callable, got NoneType"):
        rk.distributed.wrap(network(), None)


def test_blocks_are_those_of_the_network():
    model = network()
    assert rk.distributed.blocks(model) == list(model.blocks)
    assert rk.distributed.blocks(nn.Sequential(nn.ReLU(), model)) == list(model.blocks)
    two = nn.ModuleList([model, network()])
    assert rk.distributed.blocks(two)[-2:] == list(two)  # the innermost first
