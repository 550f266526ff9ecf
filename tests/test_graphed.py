"""`graphed`: warm-up, recording and replay in their order, with a graph that records PyTorch's operators on the CPU."""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import robustkern as rk
from robustkern import _library, graphs
from robustkern.attacks import PGD

events = []


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    """What torch.cuda.CUDAGraph is: replay() runs the operators again, on the tensors of the recording."""

    def __init__(self):
        self.calls, self.generators = [], []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self):
        events.append("replay")
        for func, args, kwargs, result in self.calls:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            results, written = (again, result) if isinstance(again, (tuple, list)) else ((again,), (result,))
            for new, old in zip(results, written, strict=True):
                if isinstance(new, torch.Tensor) and new is not old:
                    old.detach().copy_(new)


@pytest.fixture
def cuda(monkeypatch):
    """CPU tensors count as a device's; what recording does to the tensors in `state` is undone, as it runs nothing."""
    state = []
    events.clear()

    @contextmanager
    def graph(recorded):
        events.append("record")
        before = [tensor.detach().clone() for tensor in state]
        try:
            with Recorder(recorded):
                yield
        finally:
            with torch.no_grad(), _disable_current_modes():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    monkeypatch.setattr(graphs, "_why_no_graph", lambda args: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    _library.warn_once.cache_clear()
    return state


WARM_UP = ["wait", "wait"]


def network():
    torch.manual_seed(0)
    # Five channels: the input gradient of fewer is a kernel of ours, which is left out while operators are recorded.
    return nn.Sequential(nn.Conv2d(5, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4))


def batches(count, size=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(size, 5, 6, 6, generator=generator), torch.arange(size) % 4


def training_step(model, optimizer):
    loss = rk.losses.GradientPenalty(weight=0.3, p=2.0)

    def step(x, y):
        optimizer.zero_grad()
        terms = loss(model, x, y)
        terms.backward(inputs=model.parameters())
        optimizer.step()
        return terms

    return step


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.fixture
def unread(monkeypatch):
    """On a device the numbers of a batch are not looked at."""
    monkeypatch.setattr(rk._classifier, "is_readable", lambda tensor: False)
    monkeypatch.setattr(rk._late, "must_wait", lambda tensor: True)
    monkeypatch.setattr(rk._late, "check_late", lambda *_: None)


def test_a_penalised_step_ends_with_the_same_bits(cuda, unread):
    eager, model = network(), network()
    step = training_step(eager, optimizer_of(eager))
    expected = [step(x, y).detach() for x, y in batches(7)]

    optimizer = optimizer_of(model)
    together = rk.graphed(training_step(model, optimizer), optimizer=optimizer, warmup=2)
    cuda += [*model.parameters(), *model.buffers()]
    for k, (x, y) in enumerate(batches(7)):
        if k == 2:
            cuda += [state["momentum_buffer"] for state in optimizer.state.values()]
        found = together(x, y)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:2], expected[k][:2], strict=True))
        assert not found.total.requires_grad
    assert events == [*WARM_UP, *WARM_UP, "record", *["replay"] * 5]
    for ours, theirs in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert together.recordings == 1 and together.why_not is None


def test_an_attack(cuda, unread):
    model, attack = network(), PGD(0.1, steps=3, random_start=False)
    cuda += [*model.buffers()]
    together = rk.graphed(lambda x, y: attack(model, x, y), warmup=1)
    for x, y in batches(4):
        assert torch.equal(together(x, y), attack(model, x, y))
    assert events == [*WARM_UP, "record", "replay", "replay", "replay"]


def test_results_are_written_by_the_next_call(cuda):
    together = rk.graphed(lambda x: {"double": 2 * x, "pair": (x + 1, [x - 1])}, warmup=1)
    together(torch.zeros(2))
    first, second = together(torch.ones(2)), together(torch.full((2,), 5.0))
    assert first["double"].data_ptr() == second["double"].data_ptr()
    assert second["double"].tolist() == [10, 10] and second["pair"][1][0].tolist() == [4, 4]


def test_other_arguments_are_another_recording(cuda):
    together = rk.graphed(lambda x, factor: factor * x, warmup=1, most=3)
    for x, factor in [(torch.ones(2), 2), (torch.ones(3), 2), (torch.ones(2), 3)]:
        for _ in range(3):
            assert torch.equal(together(x, factor), factor * x)
    assert together.recordings == 3
    assert events == [*WARM_UP, "record", "replay", "replay"] * 3
    events.clear()
    with pytest.warns(
        UserWarning, match="runs as it is, without a CUDA graph: 3 recordings are all that it was allowed"
    ):
        assert torch.equal(together(torch.ones(4), 2), torch.full((4,), 2.0))
    with torch.no_grad():
        assert torch.equal(together(torch.ones(2), 2), torch.full((2,), 2.0))
    assert not events
    assert torch.equal(together(torch.ones(3), 2), torch.full((3,), 2.0)) and events == ["replay"]


def test_a_learning_rate_that_is_a_number_is_another_recording(cuda):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    cuda.append(weight)

    def step(x):
        optimizer.zero_grad()
        (weight * x).sum().backward()
        optimizer.step()

    together = rk.graphed(step, optimizer=optimizer, warmup=1)
    for rate in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(3):
            together(torch.ones(2))
    assert together.recordings == 2
    assert weight.tolist() == [1 - 3 * 0.5 - 3 * 0.25] * 2


def test_what_cannot_be_recorded_runs_as_it_is(cuda):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    cuda.append(weight)

    def reading(x):  # gradients accumulate: a recording that failed must not have left any
        (weight * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return x * x.sum().item()

    together = rk.graphed(reading, optimizer=optimizer, warmup=1)
    x = torch.ones(2)
    together(x)
    message = (
        r"graphed: reading runs as it is, without a CUDA graph: PyTorch cannot record it \(operation not permitted when"
    )
    with pytest.warns(UserWarning, match=message):
        together(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(together(x), torch.full((2,), 2.0))
    assert events == [*WARM_UP, "record"]
    assert weight.tolist() == [1 - 4 * 0.5] * 2 and weight.grad is None
    assert together.recordings == 0 and together.why_not.startswith("PyTorch cannot record it")


def test_generators_are_registered(cuda):
    generator = torch.Generator()
    together = rk.graphed(lambda x: x + 1, generators=[generator], warmup=1)
    for _ in range(2):
        together(torch.ones(1))
    (recording,) = together._recordings.values()
    assert recording.graph.generators == [generator]


# ------------------------------------------------------------------ without a device


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_device_the_step_runs_as_it_is():
    _library.warn_once.cache_clear()
    eager, model = network(), network()
    step = training_step(eager, optimizer_of(eager))
    together = rk.graphed(training_step(model, optimizer_of(model)))
    message = "graphed: step runs as it is, without a CUDA graph: there is no CUDA device"
    for k, (x, y) in enumerate(batches(3)):
        with nullcontext() if k else pytest.warns(UserWarning, match=message):
            found = together(x, y)
        expected = step(x, y)
        assert found.weight == expected.weight and torch.equal(found.total, expected.total)
    assert together.recordings == 0 and together.why_not == "there is no CUDA device"
    for ours, theirs in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((torch.ones(2),), "its tensors are not on one CUDA device"),
        ((torch.ones(2), torch.ones(2, device="meta")), "its tensors are not on one CUDA device"),
        ((3,), "it was called without tensors"),
    ],
)
def test_arguments_that_are_nothing_for_a_graph(monkeypatch, args, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _library.warn_once.cache_clear()
    together = rk.graphed(lambda *args: len(args))
    with pytest.warns(UserWarning, match=why):
        assert together(*args) == len(args)
    assert together.why_not == why


def test_as_a_decorator():
    @rk.graphed
    def step(x):
        return x + 1

    _library.warn_once.cache_clear()
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="graphed: step runs"):
            assert step(torch.ones(1)).item() == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: rk.graphed(3), TypeError, "step must be callable, got int"),
        (lambda p: rk.graphed(len, warmup=0), ValueError, "warmup must be an integer of at least 1, got 0"),
        (lambda p: rk.graphed(len, most=0), ValueError, "most must be an integer of at least 1, got 0"),
        (
            lambda p: rk.graphed(len, optimizer=[p]),
            TypeError,
            "optimizer must be a torch.optim.Optimizer, got Parameter",
        ),
        (lambda p: rk.graphed(len, generators=[3]), TypeError, "generators must be torch.Generators, got int"),
        (
            lambda p: rk.graphed(len, optimizer=torch.optim.AdamW([p])),
            ValueError,
            r"optimizer must be capturable: make it with torch.optim.AdamW\(..., capturable=True\)",
        ),
    ],
)
def test_wrong_use(make, error, message):
    with pytest.raises(error, match=f"graphed: {message}"):
        make(nn.Parameter(torch.ones(1)))


def test_arguments_that_are_not_hashable(cuda):
    with pytest.raises(TypeError, match="must be called with tensors and hashable values"):
        rk.graphed(lambda x, options: x)(torch.ones(1), {})
