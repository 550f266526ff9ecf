"""Attacks and training steps do not wait for a device: here with CPU tensors that must not be read."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from robustkern import Draw, _classifier, _late, losses, training
from robustkern.attacks import APGD, FGSM, NFGSM, PGD
from robustkern.attacks._common import attacked
from robustkern.losses._passes import Rise
from robustkern.sharding import Shard
from robustkern.training import trainer as trainer_module
from robustkern.training.step import Stepper

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.is_nonzero,
    aten.equal,
    aten.masked_select,
    aten._unique2,
}
READING = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__, torch.Tensor.__float__}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in READS, f"{func} waits for the device"
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a mask waits for the device"
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unread(monkeypatch):
    """The CPU counts as a device that must be waited for; what is due from before is settled."""
    _late.settle()
    monkeypatch.setattr(_late, "must_wait", lambda tensor: True)
    monkeypatch.setattr(_classifier, "is_readable", lambda tensor: False)
    yield
    _late._open.clear()


@contextmanager
def watched():
    """Nothing is read but what was on its way before."""
    init, read, fresh = _late.Late.__init__, _late.Late.read, []

    def noted(late, values):
        init(late, values)
        fresh.append(late)

    def read_if_old(late):
        assert late not in fresh, "numbers are read that the device was asked for just now"
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return read(late)

    with pytest.MonkeyPatch.context() as patch, _Operators(), _Functions():
        patch.setattr(_late.Late, "__init__", noted)
        patch.setattr(_late.Late, "read", read_if_old)
        yield


def network():
    torch.manual_seed(0)
    # Five channels: the input gradient of fewer is a kernel of ours, which is left out while operators are watched.
    layers = [nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
    return nn.Sequential(*layers)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 5, 6, 6, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize(
    "read", [lambda t: t.sum().item(), lambda t: bool(t.sum() > 0), lambda t: t[t > 0], lambda t: t.cpu()]
)
def test_reading_is_noticed(read):
    with pytest.raises(AssertionError, match="waits for the device"), watched():
        read(torch.rand(3))


ATTACKS = [
    PGD(0.1, steps=3),
    PGD(0.5, steps=2, norm="l2", restarts=2, loss="dlr"),
    FGSM(0.1),
    NFGSM(0.1),
    APGD(0.1, steps=4),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_attacks_do_not_wait(attack, unread):
    x, y = batch()
    model = network()
    expected = attack(model, x, y, torch.Generator().manual_seed(0))
    with watched():
        found = attack(model, x, y, torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)


METHODS = {
    "plain": losses.CrossEntropy(),
    "gradient penalty": losses.GradientPenalty(),
    "finite differences": losses.GradientPenalty(estimator="finite-difference"),
    "Jacobian penalty": losses.JacobianPenalty(),
    "PGD": losses.AdversarialTraining(PGD(0.1, steps=2)),
    "half PGD": losses.AdversarialTraining(FGSM(0.1), weight=0.5),
    "TRADES": losses.TRADES(eps=0.1, steps=2),
    "MART": losses.MART(eps=0.1, steps=2),
    "VAT": losses.VAT(),
    "GradAlign": losses.GradAlign(0.2),
}


@pytest.mark.parametrize("method", METHODS)
def test_training_steps_do_not_wait(method, unread):
    x, y = batch()
    model = network()
    config = training.TrainingConfig(method="standard", data="digits", clip=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stepper = Stepper(config, model, optimizer, METHODS[method], training.distributed.Group())
    assert stepper.late
    first = stepper.start(x, y, Shard(0, 6, 6), 0, 10)
    before = model[4].weight.clone()
    with watched():
        second = stepper.start(x, y, Shard(0, 6, 6), 1, 10, before_update=lambda: first.outcome())
    assert second.outcome().finite
    assert not torch.equal(model[4].weight, before)


# ------------------------------------------------------------------ what is read late


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: (x * 255, y), r"FGSM, call \d+: x must be in \[0, 1\], got values from"),
        (lambda x, y: (x * torch.nan, y), r"FGSM, call \d+: x must be in \[0, 1\], got values from nan"),
        (lambda x, y: (x, y - 1), r"FGSM, call \d+: y must be classes from 0 on, got -1"),
        (lambda x, y: (x, y + 1), r"FGSM, call \d+: y must be classes from 0 to 4, got 5"),
    ],
)
def test_a_wrong_batch_is_told_one_call_late(wrong, message, unread):
    x, y = batch()
    model, attack = network(), FGSM(0.1)
    attack(model, *wrong(x, y))
    with pytest.raises(ValueError, match=message):
        attack(model, x, y)
    attack(model, x, y)
    _late.settle()


class Poisoned:
    """Not finite at some steps, in value or gradient."""

    def __init__(self, loss, at, kind):
        self.loss, self.at, self.kind = loss, at, kind

    def __call__(self, model, x, y, draw: Draw):
        terms = self.loss(model, x, y, draw)
        if draw.step not in self.at:
            return terms
        if self.kind == "loss":
            return terms._replace(orientation=terms.orientation * float("nan"))
        parameter = next(iter(model.parameters()))
        return terms._replace(orientation=terms.orientation + (parameter * 0).sum().abs().sqrt())


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(training.run_folder.RunFolder, "draw", lambda *_: None)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_late_run_ends_with_the_same_bits(tmp_path, monkeypatch, optimizer, kind):
    """Steps that are not finite come first, in a row, and last in an epoch; one run is stopped and resumed."""
    build = training.trainer.build_loss
    poisoned = (0, 3, 4, 7, 9, 10)
    monkeypatch.setattr(
        trainer_module, "build_loss", lambda *args, **options: Poisoned(build(*args, **options), poisoned, kind)
    )
    options = {"epochs": 3, "batch_size": 16, "train_samples": 80, "eval_samples": 20, "ema": 0.9, "lr": 0.05}
    config = training.TrainingConfig(
        "digits",
        "pgd",
        **options,
        options={"steps": 2},
        optimizer=optimizer,
        max_skipped=9,
        clip=1.0,
        checkpoint_every=4,
    )
    expected = training.train(config, tmp_path / "at once")

    monkeypatch.setattr(_late, "must_wait", lambda tensor: True)
    found = training.train(config, tmp_path / "late")

    class Stop(training.Observer):
        def on_step(self, progress):
            if progress.step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(config, tmp_path / "resumed", observer=Stop())
    resumed = training.train(config, tmp_path / "resumed", resume=True)
    _late.settle()

    def bare(rows):
        return [{name: value for name, value in row.items() if name != "ms_per_step"} for row in rows]

    for run, name in ((found, "late"), (resumed, "resumed")):
        assert bare(run.rows) == bare(expected.rows)
        for weights in ("model.safetensors", "ema.safetensors"):
            assert (tmp_path / name / weights).read_bytes() == (tmp_path / "at once" / weights).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_too_many_in_a_row_are_told_a_step_late_with_their_number(tmp_path, monkeypatch):
    build = training.trainer.build_loss
    monkeypatch.setattr(
        trainer_module, "build_loss", lambda *args, **options: Poisoned(build(*args, **options), range(3, 99), "loss")
    )
    monkeypatch.setattr(_late, "must_wait", lambda tensor: True)
    config = training.TrainingConfig("digits", "standard", epochs=2, batch_size=16, train_samples=160, max_skipped=2)
    steps = []

    class Watch(training.Observer):
        def on_step(self, progress):
            steps.append(progress.step)

    with pytest.raises(training.TrainingError, match=r"not finite 3 steps in a row \(the last is step 6,"):
        training.train(config, tmp_path, observer=Watch())
    assert steps[-1] == 6


# ------------------------------------------------------------------ what is copied, and what leads where


def test_only_buffers_that_can_be_written_are_copied():
    class Counting(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 5))
            self.register_buffer("calls", torch.zeros(()))

    model, copied = Counting(), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is aten.clone:
                copied.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with Copies(), attacked(model):
        pass
    assert copied == [torch.Size([])]
    model[1].register_forward_hook(lambda *_: None)
    with Copies(), attacked(model):
        pass
    assert len(copied) == 1 + 4


def test_a_buffer_that_was_not_copied_is_not_written_in_silence():
    class Adapting(nn.Sequential):
        def forward(self, x):
            self[1].running_mean.add_(1.0)
            return super().forward(x)

    x, y = batch()
    model = Adapting(nn.Flatten(), nn.BatchNorm1d(180), nn.Linear(180, 5))
    with pytest.raises(RuntimeError, match="must not write into buffers of torch.nn's modules that are in eval mode"):
        FGSM(0.1)(model, x, y)


def test_the_total_of_adversarial_training_leads_to_the_adversary_alone(monkeypatch):
    """Its pass without a graph has no part in the backward pass at weight 1, and has its part at any other."""
    x, y = batch()
    model = network()
    terms = losses.AdversarialTraining(FGSM(0.1))(model, x, y, Draw(torch.Generator().manual_seed(0)))
    assert isinstance(terms, Rise)

    def deferred(total):
        return any("Deferred" in node.name() for node in losses_graph(total))

    assert not deferred(terms.total) and deferred(terms._replace(weight=0.5).total)
    assert deferred(terms._replace(orientation=terms.orientation * 2).total)
    torch.testing.assert_close(terms.total, terms.orientation + terms.smoothness)


def losses_graph(tensor):
    from robustkern._graph import graph_nodes

    return graph_nodes(tensor)
