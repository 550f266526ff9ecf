"""The derivatives of robustkern's own operators: in C++, and in Python where robustkern._aten does not load."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import robustkern as rk
from robustkern import _library
from robustkern.ops import _chains

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(_library.aten_extension() is None, reason="needs robustkern._aten")

# name of the operator -> where the arguments of the next one come from
EXPECTED = {
    "row_norm": "cotangent 0, x, last result, weight, inner, p, squared",
    "row_norm_backward": "cotangent 0, grad, x, norm, weight, inner, p, squared",
    "kl_divergence": "cotangent 0, p_logits, q_logits, last result, temperature, is needed 0, is needed 1",
    "kl_divergence_backward": "cotangent 0, cotangent 1, grad, p_logits, q_logits, statistics, temperature, "
    "is needed 1, is needed 2",
    "margin_loss": "cotangent 0, last result",
    "random_cotangents": "cotangent 0, outputs, seed, law",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_schemas_say_what_differentiates_an_operator(name):
    following = name.replace("_backward", "") + ("_double_backward" if name.endswith("_backward") else "_backward")
    op = getattr(torch.ops.robustkern, name).default
    link = _chains.link(op, getattr(torch.ops.robustkern, following).default)
    names = [argument.name for argument in op._schema.arguments]

    def said(kind, i):
        if kind == _chains.ARGUMENT:
            return names[i]
        return "last result" if kind == _chains.LAST_RESULT else f"{kind.lower().replace('_', ' ')} {i}"

    assert ", ".join(said(*source) for source in link.sources) == EXPECTED[name]


def nodes(tensor):
    return " ".join(node.name() for node in rk._graph.graph_nodes(tensor))


def test_python_has_no_part_in_them():
    x = torch.randn(4, 3, requires_grad=True)
    loss = rk.ops.softmax_cross_entropy(x, torch.tensor([0, 1, 2, 0]), impl="kernel")
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    norm = rk.ops.row_norm(grad, impl="kernel")
    assert "rk::aten" in loss.grad_fn.name() or "rk::aten" in nodes(loss)
    assert "Generated" not in nodes(norm) and "rk::aten" in nodes(norm)


def test_a_result_that_was_not_asked_for_has_no_derivative():
    p, q = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    p, q = p[0], q[0]
    value, statistics = torch.ops.robustkern.kl_divergence(p, q, 1.0)
    assert value.requires_grad and not statistics.requires_grad
    grad_p, grad_q = torch.ops.robustkern.kl_divergence_backward(
        torch.ones(4), p, q, statistics.detach(), 1.0, True, False
    )
    assert grad_p.requires_grad and not grad_q.requires_grad and grad_q.shape == (0,)


def test_what_was_saved_must_not_change():
    x = torch.randn(4, 3, requires_grad=True)
    norm = rk.ops.row_norm(x, impl="kernel")
    norm.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norm.sum().backward()


def test_a_graph_is_freed():
    x = torch.randn(4, 3, requires_grad=True)
    norm = rk.ops.row_norm(x, impl="kernel")
    norm.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        norm.sum().backward()


def test_saved_tensors_go_through_hooks():
    seen = []
    x = torch.randn(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.clone(), lambda t: t):
        norm = rk.ops.row_norm(x, 3.0, impl="kernel")
        (grad,) = torch.autograd.grad(norm.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert (4, 3) in seen and (4,) in seen
    v = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(rk.ops.row_norm(v, 3.0, impl="kernel").sum(), v, create_graph=True)
    assert torch.equal(second, torch.autograd.grad(expected.sum(), v)[0])


@pytest.mark.long
def test_in_python_where_the_extension_does_not_load():
    """The property tests of cotangents and of torch.func, in a process of their own."""
    program = (
        "import sys; sys.modules['robustkern._aten'] = None\n"
        "import pytest, robustkern\n"
        "assert robustkern._library.aten_extension() is None\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ("-q", "-p", "no:cacheprovider", "-k", "not compile")
    command = (sys.executable, "-c", program, *options, "tests/test_cotangents.py", "tests/test_transforms.py")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused_rather_than_lost(requires_grad):
    """Of the bare operators; the functions of `robustkern.ops` are composed under forward mode."""
    x = torch.randn(4, 6).requires_grad_(requires_grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn(4, 6))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            torch.ops.robustkern.row_norm(dual, None, 1, 2.0, False)
