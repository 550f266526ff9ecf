"""Wrong arguments: every tensor argument of every registered operator, and every option of the public functions."""

import math
import re

import pytest
import torch

from cases import CASES, OPS, recorded_calls
from robustkern import ops
from robustkern.ops import (
    attack_start,
    attack_step,
    attention_jvp,
    kl_divergence,
    margin_loss,
    random_cotangents,
    row_norm,
    softmax_cross_entropy,
)

# A sample with every optional argument given, by operator.
COMPLETE = {op: [c for c in CASES if c.op == op and ("weight" in c.name or "probabilities" in c.name)] for op in OPS}
CALLS = [
    (case, name)
    for op in OPS
    for case in [next(c for c in CASES if c.op == op), *COMPLETE[op][:2]]
    for name in ("", "_backward", "_double_backward")[: 1 + case.orders]
]
# Arguments with a shape and dtype of their own, to which the others must conform.
FREE = ("x", "logits", "p_logits", "outputs", "slopes")
over_calls = pytest.mark.parametrize(("case", "order"), CALLS, ids=lambda v: str(v) or "forward")


def call_of(case, order, device):
    return recorded_calls(case.sample(device, torch.float32))[f"{case.op}{order}"]


def refused(call, argument, value):
    """Runs the call with one argument replaced; returns the message, which names operator, argument and value."""
    with pytest.raises(RuntimeError, match=rf"(^|\s){call.name}: ") as error:
        call(**{argument: value})
    message = str(error.value).split("\n")[0]
    assert re.search(rf"\b{argument}\b", message.split(": ")[-1]), message
    assert " must " in message, message
    return message


def shape_of(tensor):
    return str(list(tensor.shape))


@over_calls
def test_shapes(case, order, device):
    call = call_of(case, order, device)
    first = next(iter(call.tensors))
    for name, tensor in call.tensors.items():
        wrong = [tensor[None], tensor[None, None], tensor.flatten()[0]]  # a dimension more, two more, none
        any_rows = (order == "" and name == first) or (call.name, name) == ("random_cotangents_backward", "grad")
        if not any_rows and name != "weight":
            wrong.append(torch.cat([tensor, tensor[:1]]))  # a row too many
            wrong.append(tensor[:-1])
            if tensor.dim() == 2 and tensor.shape[1] > 1 and name not in FREE:
                wrong += [tensor[:, :-1], torch.cat([tensor, tensor[:, :1]], 1)]
        for value in wrong:
            if order == "" and name == first and value.dim() == 2:
                continue  # then the others are wrong
            if call.name == "random_cotangents" and name == "outputs" and value.dim() >= 2:
                continue  # any [B, C, ...]
            with pytest.raises(RuntimeError, match=rf"{call.name}: ") as error:
                call(**{name: value})
            message = str(error.value).split("\n")[0]
            assert f" {name} " in message or name in FREE, message
            assert " must " in message, message
            assert f"got {shape_of(value)}" in message or name in FREE, message


@over_calls
def test_dtypes(case, order, device):
    call = call_of(case, order, device)
    for name, tensor in call.tensors.items():
        for dtype in (torch.float64, torch.float16, torch.int32, torch.complex64, torch.bool):
            if name in FREE and dtype.is_floating_point:
                continue  # valid by itself, but then the others are wrong
            message = refused(call, name, tensor.to(dtype))
            names = {torch.float16: "float16", torch.bool: "bool", torch.complex64: "complex64", torch.int32: "int32"}
            assert f"got {shape_of(tensor)} {names.get(dtype, 'float64')} on " in message, message


@over_calls
def test_devices(case, order, device):
    call = call_of(case, order, device)
    for name, tensor in call.tensors.items() if len(call.tensors) > 1 else ():
        elsewhere = "cpu" if device == "cuda" else "meta"  # a tensor without memory must not reach a kernel either
        message = refused(call, name, tensor.to(elsewhere))
        assert " on meta" in message or " on cpu" in message, message


@over_calls
def test_numbers(case, order, device):
    call = call_of(case, order, device)
    wrong = {
        "p": [0.5, 0.0, -1.0, math.nan],
        "squared": [True] if case.op == "row_norm" and call.arguments[-2] != 2.0 else [],
        "label_smoothing": [-0.1, 1.1, math.nan],
        "temperature": [0.0, -1.0, math.nan, math.inf],
        "inner": [0, -1, 7] if "weight" in call.tensors else [],
        "projections": [0, -1],
        "law": [-1, 4],
        "kind": [-1, 3],
    }
    for name, values in wrong.items():
        if any(a.name == name for a in call.operator._schema.arguments):
            for value in values:
                with pytest.raises(RuntimeError, match=rf"{call.name}: .*\b{name}\b.*must"):
                    call(**{name: value})


def test_weights_that_do_not_divide_the_columns(device):
    x, weight = torch.ones(2, 6, device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="row_norm: weight of 4 entries with inner = 1 must divide the 6 columns"):
        torch.ops.robustkern.row_norm(x, weight, 1, 2.0, False)


# ------------------------------------------------------------------ public functions

X = torch.ones(4, 3)
ROW_NORM_MISUSE = [
    ((X.int(),), {}, TypeError, "row_norm: x must be float32, float64, float16 or bfloat16, got torch.int32"),
    ((X.to(torch.complex64),), {}, TypeError, "row_norm: x must be float32.*got torch.complex64"),
    (([1.0, 2.0],), {}, TypeError, "row_norm: x must be a tensor, got list"),
    ((X, 0.5), {}, ValueError, "row_norm: p must be 1, 2, inf or any number >= 1, got 0.5"),
    ((X, math.nan), {}, ValueError, "row_norm: p must be .* got nan"),
    ((X, 1), {"squared": True}, ValueError, "row_norm: squared needs p = 2, got p = 1.0"),
    ((torch.tensor(1.0),), {}, ValueError, "row_norm: x must have a batch dimension, got a scalar"),
    ((X, 2, torch.ones(2)), {}, ValueError, "row_norm: weight must have one element or one for each of the 3"),
    ((torch.ones(2, 4, 2), 2, torch.ones(2, 2)), {}, ValueError, r"weight must vary along the channels only"),
    ((X, 2, torch.ones(3, device="meta")), {}, ValueError, "row_norm: weight must be on cpu like x, got meta"),
    ((X,), {"impl": "fast"}, ValueError, "row_norm: impl must be 'auto', 'kernel' or 'reference', got 'fast'"),
]
LOGITS, CLASSES = torch.ones(4, 3), torch.tensor([0, 1, 2, 0])
CROSS_ENTROPY_MISUSE = [
    ((LOGITS.long(), CLASSES), {}, TypeError, "softmax_cross_entropy: logits must be float32.* got torch.int64"),
    ((LOGITS, CLASSES.bool()), {}, TypeError, "target must be integer classes or .* got torch.bool"),
    ((LOGITS, CLASSES.to(torch.complex64)), {}, TypeError, "target must be integer classes or .* got torch.complex64"),
    ((LOGITS[0], CLASSES[0]), {}, ValueError, r"logits must be \[B, C\] or \[B, C, ...\], got shape \[3\]"),
    ((LOGITS, CLASSES[:2]), {}, ValueError, r"target classes must have shape \[4\] .* got \[2\]"),
    ((LOGITS, LOGITS[:, :2]), {}, ValueError, r"target probabilities must have shape \[4, 3\] .* got \[4, 2\]"),
    ((LOGITS, CLASSES[:, None]), {}, ValueError, r"target classes must have shape \[4\] .* got \[4, 1\]"),
    ((LOGITS, CLASSES), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ((LOGITS, CLASSES), {"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
    ((LOGITS, CLASSES), {"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ((LOGITS, CLASSES), {"temperature": math.nan}, ValueError, "temperature must be positive, got nan"),
    ((LOGITS, CLASSES), {"impl": None}, ValueError, "impl must be 'auto', 'kernel' or 'reference', got None"),
]
SEED = torch.tensor([1])
COTANGENTS_MISUSE = [
    ((LOGITS.long(), 2), {}, TypeError, "random_cotangents: outputs must be float32.* got torch.int64"),
    ((LOGITS[0], 2), {}, ValueError, r"outputs must be \[B, C\] or \[B, C, ...\], got shape \[3\]"),
    ((LOGITS, 0), {}, ValueError, "random_cotangents: projections must be an integer of at least 1, got 0"),
    (
        (LOGITS[:, :0], 1),
        {"law": "orthonormal"},
        ValueError,
        "random_cotangents: projections must be at most 0 .* outputs has no entries",
    ),
    ((LOGITS, 1.5), {}, ValueError, "random_cotangents: projections must be an integer of at least 1, got 1.5"),
    ((LOGITS, "exact"), {}, ValueError, "random_cotangents: projections must be an integer .* got 'exact'"),
    ((LOGITS, 2), {"seed": 5}, TypeError, "random_cotangents: seed must be a tensor of one int64, got int"),
    ((LOGITS, 2), {"generator": 3}, TypeError, r"random_cotangents: generator must be a torch\.Generator or None"),
    (
        (LOGITS, 2),
        {"generator": torch.Generator(), "seed": torch.tensor([1])},
        ValueError,
        "random_cotangents: give a generator or a seed, not both",
    ),
    ((LOGITS, 4), {"law": "orthonormal"}, ValueError, "projections must be at most 3 for orthonormal .* got 4; 3 are"),
    ((LOGITS, 2), {"law": "normal"}, ValueError, "law must be one of 'sphere', 'gaussian', .*, got 'normal'"),
    ((LOGITS, 2), {"kind": "centered"}, ValueError, "kind must be one of 'plain', 'centred', .*, got 'centered'"),
    ((LOGITS, 2), {"seed": SEED.float()}, ValueError, r"seed must be one int64 on cpu .*, got \[1\] float32 on cpu"),
    ((LOGITS, 2), {"seed": SEED.repeat(2)}, ValueError, r"seed must be one int64 .*, got \[2\] int64 on cpu"),
    ((LOGITS, 2), {"seed": SEED.to("meta")}, ValueError, r"seed must be one int64 on cpu .*, got \[1\] int64 on meta"),
    ((LOGITS, 2), {"impl": "best"}, ValueError, "impl must be 'auto', 'kernel' or 'reference', got 'best'"),
]
MISUSE = [(row_norm, *m) for m in ROW_NORM_MISUSE] + [(softmax_cross_entropy, *m) for m in CROSS_ENTROPY_MISUSE]
MISUSE += [(random_cotangents, *m) for m in COTANGENTS_MISUSE]
IMAGES, HEADS = torch.rand(2, 3, 4), torch.rand(1, 2, 3, 4)
MISUSE += [  # the rest of theirs is in test_attack_ops.py and test_kl_divergence.py
    (attack_step, (IMAGES.long(), IMAGES.long()), {"eps": 0.1}, TypeError, "attack_step: x must be .* got torch.int64"),
    (attack_step, (IMAGES[:1], IMAGES), {"eps": 0.1}, ValueError, r"attack_step: adversary must be .* got \[1, 3, 4\]"),
    (attack_start, (IMAGES.long(),), {"eps": 0.1}, TypeError, "attack_start: x must be float.* got torch.int64"),
    (attack_start, (IMAGES,), {"eps": 0.1, "norm": "l3"}, ValueError, "attack_start: norm must be one of .* got 'l3'"),
    (kl_divergence, (LOGITS.long(), LOGITS), {}, TypeError, "kl_divergence: p_logits must be .* got torch.int64"),
    (kl_divergence, (LOGITS, LOGITS.double()), {}, TypeError, "q_logits must be torch.float32 like p_logits, got .*64"),
    (kl_divergence, (LOGITS, LOGITS[:1]), {}, ValueError, r"kl_divergence: q_logits must be .* like p_logits, got "),
    (kl_divergence, (LOGITS, LOGITS), {"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    (margin_loss, (LOGITS, CLASSES.float()), {}, TypeError, "margin_loss: target must be .* got torch.float32"),
    (margin_loss, (LOGITS, CLASSES), {"kind": "ce"}, ValueError, "margin_loss: kind must be 'cw' or 'dlr', got 'ce'"),
    (attention_jvp, (HEADS.long(),) * 3, {}, TypeError, "attention_jvp: q must be float32.* got torch.int64"),
    (attention_jvp, (HEADS[0],) * 3, {}, ValueError, r"attention_jvp: q must be \[B, H, L, D\], got shape \[2, 3, 4\]"),
    (attention_jvp, (HEADS,) * 3, {"mask_tangent": HEADS}, ValueError, "attention_jvp: mask_tangent needs a mask"),
    (
        attention_jvp,
        (HEADS,) * 3,
        {"mask": torch.ones(3, 3) > 0, "mask_tangent": HEADS},
        ValueError,
        "attention_jvp: mask_tangent needs a floating-point mask, got a boolean one",
    ),
]


def brief(value):
    """A test name that is the same in every process: no addresses, no random numbers."""
    return getattr(value, "__name__", "inputs" if isinstance(value, tuple) else str(value)[:30])


@pytest.mark.parametrize(("function", "inputs", "options", "error", "message"), MISUSE, ids=brief)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_misuse_of_public_functions(function, inputs, options, error, message, impl):
    with pytest.raises(error, match=message) as raised:
        function(*inputs, **{"impl": impl, **options})
    assert "\n" not in str(raised.value)


def test_every_operator_has_its_misuse_here():
    assert {function.__name__ for function, *_ in MISUSE} == set(ops.__all__)


@pytest.mark.parametrize("bad", [3, -1, 10**12])
def test_a_class_that_does_not_exist(bad, device, emulated):
    """The CPU raises; a CUDA kernel could only stop the device, so there the loss is NaN."""
    target = CLASSES.to(device).clone()
    target[2] = bad
    if device == "cuda" or emulated:
        leaf = LOGITS.to(device).requires_grad_()
        loss = softmax_cross_entropy(leaf, target, impl="kernel")
        assert loss.isnan().tolist() == [False, False, True, False]
        loss.sum().backward()
        assert leaf.grad[[0, 1, 3]].isfinite().all()
        return
    with pytest.raises(RuntimeError, match=rf"target\[2\] is class {bad}, but there are 3 classes and ignore_index is"):
        softmax_cross_entropy(LOGITS, target, impl="kernel")
    assert softmax_cross_entropy(LOGITS, target, ignore_index=bad, impl="kernel")[2] == 0


def test_accepted_integer_targets(device):
    expected = softmax_cross_entropy(LOGITS.to(device), CLASSES.to(device), impl="kernel")
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(softmax_cross_entropy(LOGITS.to(device), CLASSES.to(device, dtype), impl="kernel"), expected)


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 1, 1), (1, 3, 1, 1)], ids=str)
def test_accepted_weights(shape, device):
    x = torch.randn(2, 3, 4, 4, device=device)
    weight = torch.linspace(1.0, 2.0, max(shape), device=device).view(shape)
    expected = (x * weight.reshape(-1, 1, 1)).flatten(1).norm(dim=1)
    torch.testing.assert_close(row_norm(x, weight=weight, impl="kernel"), expected)
    torch.testing.assert_close(row_norm(x, weight=weight, impl="reference"), expected)


def test_what_has_no_kernel_runs_in_the_reference_or_is_refused(device):
    x, weight = torch.randn(2, 3, device=device), torch.ones(3, device=device, requires_grad=True)
    row_norm(x, weight=weight).sum().backward()
    assert weight.grad.any()
    with pytest.raises(RuntimeError, match="row_norm: impl='kernel' is not possible: weight requires grad"):
        row_norm(x, weight=weight, impl="kernel")
    soft = torch.full((2, 3), 1 / 3, device=device, requires_grad=True)
    softmax_cross_entropy(x, soft).sum().backward()
    assert soft.grad.any()
    with pytest.raises(RuntimeError, match="impl='kernel' is not possible: target requires grad"):
        softmax_cross_entropy(x, soft, impl="kernel")
