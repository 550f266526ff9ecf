"""Jacobian norms: every wrong use raises one sentence instead of training nothing."""

import math

import pytest
import torch
from torch import nn

import robustkern
from jacobian_cases import images, network
from robustkern import input_jacobian, jacobian_norm, jacobian_spectral_norm, suggest_projections
from robustkern.double_backward import folds


def misuses(model, x):
    """What the user does wrong, the error, and words of the sentence that says so."""
    leaf = x.detach().requires_grad_()
    outputs = model(leaf)
    other = x.detach().requires_grad_()
    frozen = nn.Linear(75, 2, device=x.device, dtype=x.dtype).requires_grad_(False)
    with torch.no_grad():
        without_graph = model(leaf)
    return {
        "x does not require grad": ((model(x), x.detach()), ValueError, r"x does not require grad: call"),
        "another tensor": ((outputs, other), ValueError, "outputs does not depend on x: compute it from this very"),
        "detached": ((outputs.detach(), leaf), ValueError, "outputs has no graph: .* or detached"),
        "no_grad": ((without_graph, leaf), ValueError, r"outputs has no graph: it was computed under torch\.no_grad"),
        "one number each": ((outputs[:, 0], leaf), ValueError, r"outputs must be \[B, C\] .* B = 6 .* got \[6\]"),
        "another batch": ((outputs[:2], leaf), ValueError, r"B = 6 for x of shape \[6, 3, 5, 5\], got \[2, 4\]"),
        "no outputs": ((outputs[:, :0], leaf), ValueError, r"shape \[6, 0\] have no entries"),
        "integer x": ((outputs, x.long()), TypeError, r"x must be a floating-point tensor, got torch\.int64"),
        "integer outputs": ((outputs.long(), leaf), TypeError, r"outputs must be a floating-point tensor"),
        "a number": ((1.0, leaf), TypeError, "outputs must be a tensor, got float"),
        "linear and frozen": ((frozen(leaf.flatten(1)), leaf), ValueError, "would train nothing: outputs is linear"),
    }


@pytest.mark.parametrize("function", [jacobian_norm, input_jacobian, jacobian_spectral_norm])
@pytest.mark.parametrize("name", list(misuses(network("cpu"), images("cpu"))))
def test_wrong_use_is_told_in_one_sentence(name, function, device):
    inputs, error, message = misuses(network(device), images(device))[name]
    with pytest.raises(error, match=rf"^{function.__name__}: .*{message}") as raised:
        function(*inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"projections": 5},
            "at most 4 for orthonormal vectors in 4 dimensions, got 5; .* other laws take any",
        ),
        *(
            ({"projections": wrong}, "jacobian_norm: projections must be an integer of at least 1 or .exact., got ")
            for wrong in (0, 1.5, "all", None, math.nan, math.inf, True)
        ),
        ({"law": "uniform"}, "jacobian_norm: law must be one of"),
        ({"law": "uniform", "projections": "exact"}, "jacobian_norm: law must be one of"),
        ({"first": -1}, "jacobian_norm: first must be an integer of at least 0, got -1"),
        ({"first": 1.5}, "jacobian_norm: first must be an integer of at least 0, got 1.5"),
        *(({"weight": wrong}, "jacobian_norm: weight must be a number") for wrong in ([1.0, 2.0], "a", math.nan)),
        ({"kind": "central"}, "jacobian_norm: kind must be one of 'plain', 'centred', 'fisher', got 'central'"),
        ({"kind": "central", "projections": "exact"}, "jacobian_norm: kind must be one of"),
        ({"reduction": "max"}, "jacobian_norm: reduction must be one of 'none', 'mean', 'sum', got 'max'"),
        ({"return_variance": True}, "jacobian_norm: return_variance needs at least two projections"),
        ({"return_variance": True, "projections": 2, "squared": False}, "return_variance needs squared=True"),
        ({"impl": "other"}, "jacobian_norm: impl must be"),
    ],
    ids=str,
)
def test_options_are_checked(options, message, device):
    model, x = network(device), images(device)
    with pytest.raises(ValueError, match=message) as raised:
        jacobian_norm(model(x), x, **options)
    assert "\n" not in str(raised.value)


def test_options_of_the_others_are_checked(device):
    model, x = network(device), images(device)
    outputs = model(x)
    with pytest.raises(ValueError, match="jacobian_spectral_norm: iterations must be an integer of at least 0, got -1"):
        jacobian_spectral_norm(outputs, x, -1)
    with pytest.raises(ValueError, match=r"jacobian_spectral_norm: start must be \[6, 4\] .* got \[6, 3\]"):
        jacobian_spectral_norm(outputs, x, start=outputs[:, :3])
    with pytest.raises(TypeError, match="jacobian_spectral_norm: start must be a tensor or None, got list"):
        jacobian_spectral_norm(outputs, x, start=[1.0])
    for function in (jacobian_norm, jacobian_spectral_norm):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}: generator must be a torch\.Generator or None, got int"
        ):
            function(outputs, x, generator=3)
    assert not jacobian_spectral_norm(outputs, x, start=torch.zeros_like(outputs)).any()
    one = torch.tensor(1.0)
    for estimate, variance, error, options, message in (
        (one, one, 0.0, {}, r"relative_error must be a number in \(0, inf\), got 0.0"),
        (one, one, 0.1, {"law": "uniform"}, "law must be one of"),
        (one, one, 0.1, {"projections": "exact"}, "projections must be an integer of at least 1, got 'exact'"),
        (one, one, 0.1, {"dimensions": 0}, "dimensions must be an integer of at least 1, got 0"),
        (one.expand(3), one, 0.1, {}, r"variance must have the shape of estimate, \[3\], got \[\]"),
        (math.nan * one, one, 0.1, {}, "estimate and variance must be finite"),
        (0 * one, one, 0.1, {"law": "sphere"}, "no number of projections gives an estimate of zero"),
    ):
        with pytest.raises(ValueError, match=f"suggest_projections: {message}"):
            suggest_projections(estimate, variance, error, **{"projections": 2, "dimensions": 4, **options})
    assert suggest_projections(one, one, 1e-170, projections=2, dimensions=4, law="sphere") > 10**18
    for projections, law in ((1, "sphere"), (4, "orthonormal")):
        with pytest.raises(ValueError, match=f"suggest_projections: {projections} projections .* show no variance"):
            suggest_projections(one, one, 0.1, projections=projections, dimensions=4, law=law)


def test_wrong_use_is_told_where_all_projections_go_together(device):
    """Under install(), where networks like these are folded."""
    x = torch.rand(4, 6, device=device, requires_grad=True)
    frozen = nn.Linear(6, 3).to(device).requires_grad_(False)
    with robustkern.fused_double_backward():
        assert folds(frozen(x), x, 3, "auto")
        with pytest.raises(
            ValueError, match="^jacobian_norm: the input gradient has no graph, so a penalty on it would"
        ):
            jacobian_norm(frozen(x), x, 3)


def test_a_model_compiled_from_outside_is_refused(device):
    model, x = network(device, torch.float32), images(device, torch.float32)
    outputs = torch.compile(model, backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match=r"^jacobian_norm: the model was compiled from outside"):
        jacobian_norm(outputs, x)
    torch.testing.assert_close(
        jacobian_norm(outputs, x, "exact", create_graph=False), jacobian_norm(model(x), x, "exact").detach()
    )
