"""Losses in training loops of others: plain DDP, a model that is sharded already, accelerate, GradScaler."""

import copy
import json
import os
import traceback

import pytest
import torch
from torch import nn

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from processes import answers, fork

import robustkern as rk
from robustkern import losses
from robustkern.training.distributed import settle_imports

LOSS = losses.GradientPenalty(eps=0.1)


def parts():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 1, 4, 4, generator=generator), torch.arange(8) % 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Softplus(), nn.Linear(12, 4))
    return model, x, y


def expected():
    """The weights after a step of one process."""
    model, x, y = parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LOSS(model, x, y).backward(inputs=model.parameters())
    optimizer.step()
    return list(model.parameters())


def plain_ddp(model, x, y):
    step = nn.parallel.DistributedDataParallel(rk.distributed.LossModule(model, LOSS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(x, y).total.backward()
    optimizer.step()


def sharded_already(model, x, y):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[1])
    fully_shard(model)
    step = rk.distributed.wrap(model, LOSS, shard=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(x, y).backward(inputs=step.parameters())
    optimizer.step()


def with_accelerate(model, x, y):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of another test, which may have chosen 16 bits
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, optimizer = accelerator.prepare(rk.distributed.LossModule(model, LOSS), optimizer)
    terms = step(x, y)
    accelerator.backward(terms.total)
    optimizer.step()


def in_two_processes(rank, loops):
    settle_imports()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.distributed.init_process_group("gloo")
    errors = {}
    for loop in loops:
        model, x, y = parts()
        try:
            loop(model, x[rank::2], y[rank::2])
            weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
            pairs = zip(weights, expected(), strict=True)
            errors[loop.__name__] = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
        except Exception:
            errors[loop.__name__] = traceback.format_exc()
    torch.distributed.destroy_process_group()
    return json.dumps(errors)


def test_loops_in_two_processes(tmp_path):
    loops = [plain_ddp, sharded_already]
    try:
        import accelerate  # noqa: F401  before the processes part

        loops.append(with_accelerate)
    except ImportError:
        pass
    for answer in answers(tmp_path, fork(tmp_path, in_two_processes, loops)):
        errors = json.loads(answer)
        assert len(errors) == len(loops)
        assert {loop: error for loop, error in errors.items() if not isinstance(error, float) or error > 1e-6} == {}


def test_a_grad_scaler_changes_nothing():
    model, x, y = parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(LOSS(model, x, y).total).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(list(model.parameters()), expected())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
