"""torch.library.opcheck on every registered operator; torch.compile around single calls and penalised steps."""

import dataclasses

import pytest
import torch

import robustkern
from cases import CASES, OPS, assert_accurate, assert_same_bits, cotangents, over_all, over_filled, recorded_calls
from robustkern import gradient_norm
from robustkern.losses import GradientPenalty
from robustkern.testing import Derivatives

# For compiled kernels around them, which are slow to make, one sample of each operator stands for all.
REPRESENTATIVES = [next(c for c in CASES if c.op == op and not c.empty) for op in OPS]
over_operators = pytest.mark.parametrize("case", REPRESENTATIVES, ids=lambda c: c.op)


def differentiable(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


@over_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype, device):
    """Schema, fake kernel; in one dtype also the autograd registration and tracing with static and dynamic shapes."""
    sample = case.sample(device, dtype)
    tests = ["test_schema", "test_faketensor"]
    traced = dtype == torch.float32 and case.elements <= 1000
    if traced:
        tests += ["test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    for call in recorded_calls(sample).values():
        torch.library.opcheck(call.operator, call.arguments, test_utils=tests[:2])
        order = call.name.removeprefix(case.op)
        if not traced or call.ends_chain:
            continue
        names = [a.name for a in call.operator._schema.arguments]
        differentiated = {"": names[:1], "_backward": names[:2]}[order]
        arguments = [differentiable(v) if n in differentiated else v for n, v in zip(names, call.arguments)]
        torch.library.opcheck(call.operator, tuple(arguments), test_utils=tests)


@over_filled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_fake_kernels_tell_shapes_dtypes_and_strides(case, dtype, device):
    for call in recorded_calls(case.sample(device, dtype)).values():
        real = call()
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = call(**{name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()})
        for fake, tensor in zip(fakes, real, strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
            assert fake.device == tensor.device


def compiled_derivatives(sample, backend, grad, u, **options):
    """Value, gradient and double backward traced into one graph."""

    def chain(x, grad, u):
        value = sample(x, impl="kernel")
        (grad_x,) = torch.autograd.grad(value, x, grad, create_graph=True)
        return (value.detach(), grad_x.detach(), *torch.autograd.grad(grad_x, (grad, x), u, allow_unused=True))

    x, grad = sample.inputs[0].detach().requires_grad_(), grad.detach().requires_grad_()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        results = torch.compile(chain, backend=backend, fullgraph=True, **options)(x, grad, u)
    value, grad_x, gg_grad, second = results
    return Derivatives(value, grad_x, gg_grad, torch.zeros_like(x) if second is None else second)


@over_operators
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_and_backward_of_a_compiled_call(case, backend, device):
    sample = case.sample(device, torch.float32)
    grad, _ = cotangents(sample)
    x = sample.inputs[0].detach().requires_grad_()
    call = torch.compile(lambda v: 3.0 * sample(2.0 * v, impl="kernel"), backend=backend, fullgraph=True)
    value = call(x)
    (grad_x,) = torch.autograd.grad(value, x, grad)
    leaf = sample.inputs[0].detach().requires_grad_()
    expected = 3.0 * sample(2.0 * leaf, impl="kernel")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad_x, torch.autograd.grad(expected, leaf, grad)[0])


@over_operators
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_double_backward(case, backend, device):
    """Tests all samples of an operator, with one compilation for each."""
    for other in (c for c in CASES if c.op == case.op and c.orders == 2 and not c.empty and c.elements <= 1000):
        torch._dynamo.reset()
        sample = other.sample(device, torch.float32)
        grad, u = cotangents(sample)
        assert_accurate(sample, grad, u, compiled_derivatives(sample, backend, grad, u))


@over_operators
def test_dynamic_batch(case, device):
    """One graph for every batch size but 0 and 1."""
    sample = case.sample(device, torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def plain(*inputs):
        return sample.op(*inputs, **sample.options, impl="kernel")

    call = torch.compile(plain, backend=count, fullgraph=True, dynamic=True)
    for rows in (2, 3, 4):
        inputs = tuple(t[:rows] for t in sample.inputs)
        assert_same_bits(call(*inputs), plain(*inputs))
    assert len(graphs) == 1


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.head = torch.nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.head(torch.nn.functional.gelu(self.conv(x)).flatten(1))


def step_inputs(device):
    model = Net().to(device)
    return model, torch.rand(4, 3, 6, 6, device=device), torch.tensor([0, 1, 2, 4], device=device)


@pytest.mark.parametrize(
    ("p", "backend"),
    [(1.0, "aot_eager"), (2.0, "aot_eager"), (1.0, "inductor"), pytest.param(2.0, "inductor", marks=pytest.mark.slow)],
)
def test_a_compiled_penalised_step(p, backend, device):
    model, x, y = step_inputs(device)
    penalty = GradientPenalty(weight=0.7, p=p, eps=0.5, impl="kernel")
    parameters = tuple(model.parameters())

    def step(x, y):
        return torch.autograd.grad(penalty(model, x, y).total, parameters)

    expected = step(x, y)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        actual = torch.compile(step, backend=backend, fullgraph=True)(x, y)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_compiled_from_outside_is_refused(backend, device):
    """PyTorch cannot differentiate a compiled backward; some versions return zeros for it."""
    model, x, y = step_inputs(device)
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(RuntimeError, match=r"compiled from outside.*compile the whole penalised step instead"):
        GradientPenalty()(compiled, x, y)
    x.requires_grad_()
    loss = torch.nn.functional.cross_entropy(compiled(x), y, reduction="none")
    measured = gradient_norm(loss, x, create_graph=False)
    x = x.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(measured, gradient_norm(loss, x).detach())


@over_operators
def test_export(case, device):
    sample = case.sample(device, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return sample.op(*inputs, **sample.options, impl="kernel")

    program = torch.export.export(Module(), sample.inputs)
    assert any(f"robustkern.{case.op}" in str(node.target) for node in program.graph.nodes)
    other = dataclasses.replace(sample, inputs=tuple(t.flip(0) for t in sample.inputs))
    torch.testing.assert_close(program.module()(*other.inputs), other(impl="kernel"))


def filled(step, model, *batch):
    """The terms of a step, and the gradients that it fills in."""
    model.zero_grad()
    terms = step(*batch)
    return tuple(terms), [parameter.grad.clone() for parameter in model.parameters()]


def eager(loss, model):
    def step(x, y):
        terms = loss(model, x, y)
        terms.backward(inputs=model.parameters())
        return terms.detach()

    return step


def test_a_step_compiled_in_one_call(device):
    model, x, y = step_inputs(device)
    loss, before = GradientPenalty(weight=0.7, p=2.0, eps=0.5), torch._dynamo.config.trace_autograd_ops
    step = robustkern.compile(loss, model, backend="aot_eager")
    for rows in (4, 3):  # the second one compiles for all that follow
        expected = filled(eager(loss, model), model, x[:rows], y[:rows])
        torch.testing.assert_close(filled(step, model, x[:rows], y[:rows]), expected)
        assert torch._dynamo.config.trace_autograd_ops == before
        assert not robustkern.is_installed()
    step(x[:3], y[:3])
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in expected[1]])  # added
    assert step.why_not is None and step.first_call_seconds > 0 and "compiled in" in repr(step)
    with pytest.raises(ValueError, match="GradientPenalty: "):
        step(x, y[:2])
    assert step.why_not is None  # the batch was wrong, not the step


def test_what_cannot_be_compiled_runs_as_it_is(device, monkeypatch):
    model, x, y = step_inputs(device)
    loss = GradientPenalty(weight=0.7)
    expected = filled(eager(loss, model), model, x, y)

    def refuse(graph, inputs):
        raise NotImplementedError("no\nmore")

    step = robustkern.compile(loss, model, backend=refuse)
    with pytest.warns(UserWarning, match=r"compile: the step of GradientPenalty of Net runs as it is, uncompiled: .*"):
        torch.testing.assert_close(filled(step, model, x, y), expected)
    assert "no" in step.why_not and "\n" not in step.why_not and "uncompiled" in repr(step)
    monkeypatch.setattr(robustkern.compiled, "_traces_gradients", lambda: False)
    with pytest.warns(UserWarning, match="cannot trace torch.autograd.grad"):
        step = robustkern.compile(loss, model, backend=refuse)
    torch.testing.assert_close(filled(step, model, x, y), expected)
    for wrong in (torch.compile(model), lambda x: x):
        with pytest.raises(TypeError, match="compile: model must be a module that is not compiled, got"):
            robustkern.compile(loss, wrong)


def test_a_compiled_step_averages_as_distributed_data_parallel_does(tmp_path, monkeypatch):
    """In a group of one process, whose sum is stood in for by one that counts two."""
    from torch import distributed as dist

    model, x, y = step_inputs("cpu")
    expected = filled(eager(GradientPenalty(), model), model, x, y)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        step = robustkern.compile(GradientPenalty(), wrapped, backend="aot_eager")
        summed = dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda t, group: summed(t.mul_(2), group=group))
        _, gradients = filled(step, model, x, y)
        torch.testing.assert_close(gradients, [2 * g for g in expected[1]])
        with wrapped.no_sync():
            torch.testing.assert_close(filled(step, model, x, y), expected)
    finally:
        dist.destroy_process_group()
