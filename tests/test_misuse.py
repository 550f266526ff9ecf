"""Every attack and every loss, called and made in every wrong way: one sentence that names it and the argument."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from robustkern import Draw, losses
from robustkern._options import _CHECKS, _CHOICES
from robustkern.attacks import APGD, FGSM, NFGSM, PGD

EPS = 0.1
CLASSES = 5


def network(outputs=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.Tanh(), nn.Linear(12, outputs))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 4, 4, generator=generator), torch.tensor([0, 1, 2, 3, 4, 1])


ATTACKS = {
    "PGD": lambda **options: PGD(**{"eps": EPS, "steps": 2, **options}),
    "PGD l2 cw": lambda **options: PGD(**{"eps": EPS, "steps": 2, "norm": "l2", "loss": "cw", **options}),
    "PGD l1 dlr": lambda **options: PGD(**{"eps": EPS, "steps": 2, "norm": "l1", "loss": "dlr", **options}),
    "FGSM": lambda **options: FGSM(**{"eps": EPS, **options}),
    "NFGSM": lambda **options: NFGSM(**{"eps": EPS, **options}),
    "APGD": lambda **options: APGD(**{"eps": EPS, "steps": 2, **options}),
    "APGD dlr-targeted": lambda **options: APGD(**{"eps": EPS, "steps": 2, "loss": "dlr-targeted", **options}),
}
LOSSES = {
    "CrossEntropy": losses.CrossEntropy,
    "LabelSmoothing": losses.LabelSmoothing,
    "Distillation": lambda **options: losses.Distillation(network(), **options),
    "AdversarialTraining": lambda **options: losses.AdversarialTraining(PGD(EPS, steps=2), **options),
    "ALP": lambda **options: losses.ALP(PGD(EPS, steps=2), **options),
    "TRADES": lambda **options: losses.TRADES(**{"steps": 2, **options}),
    "MART": lambda **options: losses.MART(**{"steps": 2, **options}),
    "VAT": losses.VAT,
    "LocalLinearity": losses.LocalLinearity,
    "GradAlign": losses.GradAlign,
    "GradientPenalty": losses.GradientPenalty,
    "GradientPenalty by differences": lambda **options: losses.GradientPenalty(
        **{"estimator": "finite-difference", **options}
    ),
    "CURE": losses.CURE,
    "JacobianPenalty": losses.JacobianPenalty,
    "FisherPenalty": losses.FisherPenalty,
    "CrossLipschitz": losses.CrossLipschitz,
    "CrossLipschitz of a part": lambda **options: losses.CrossLipschitz(**{"fraction": 0.5, **options}),
    "AWP": lambda **options: losses.AWP(losses.TRADES(steps=2), **options),
    "AWP of a penalty": lambda **options: losses.AWP(losses.GradientPenalty(), **options),
    "Lazy": lambda **options: losses.Lazy(losses.CURE(), **{"every": 1, **options}),
}
EVERY = {**ATTACKS, **LOSSES}
over_attacks = pytest.mark.parametrize("name", ATTACKS)
over_losses = pytest.mark.parametrize("name", LOSSES)
over_every = pytest.mark.parametrize("name", EVERY)
ONLY_MODULES = ("AWP", "AWP of a penalty")  # they perturb weights
NEEDS_NO_LABELS = "Distillation"


def result(made, model, x, y, **options):
    """The result that changes with a label, a draw or a logit: the adversary, or the loss and parameter gradients."""
    torch.manual_seed(3)
    found = made(model, x, y, **options)
    return found if isinstance(found, torch.Tensor) else torch.stack([found.orientation, found.smoothness]).detach()


def one_sentence(error, argument):
    message = str(error.value)
    assert "\n" not in message.split("got tensor(")[0] and re.match(r"\w+: ", message), message
    assert re.search(rf"\b{argument}\b", message), message
    assert re.search(r"must|depend", message) and len(message) < 400, message


def refused(name, argument, *arguments, **options):
    with pytest.raises((TypeError, ValueError)) as error:
        EVERY[name]()(*arguments, **options)
    one_sentence(error, argument)
    return str(error.value)


def test_every_attack_and_loss_is_here():
    from robustkern import attacks

    made = {type(make()).__name__ for make in EVERY.values()}
    named = {*losses.__all__, *attacks.__all__} - {"attacked"}
    assert not named - made, f"add {sorted(named - made)} to LOSSES or ATTACKS of tests/test_misuse.py"
    assert not made - named, f"{sorted(made - named)} is not in __all__ of robustkern.losses or robustkern.attacks"


@over_every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_labels_of_every_integer_dtype_are_classes(name, dtype):
    (x, y), model = batch(), network()
    assert torch.equal(result(EVERY[name](), model, x, y.to(dtype)), result(EVERY[name](), model, x, y))


@over_every
@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y.bool(),
        lambda y: y.double() if y.dim() else y,
        lambda y: y.tolist(),
        lambda y: y.numpy(),
        lambda y: None,
        lambda y: y[:3],
        lambda y: y[:, None],
        lambda y: nn.functional.one_hot(y),
        lambda y: y.to("meta"),
        lambda y: y.to_sparse(),
        lambda y: torch.where(y == 2, -100, y),
        lambda y: torch.where(y == 2, -1, y),
        lambda y: torch.where(y == 2, CLASSES, y),
        lambda y: torch.where(y == 2, 2**40, y),
    ],
    ids=[
        "bool",
        "float",
        "list",
        "numpy",
        "None",
        "few",
        "column",
        "one-hot",
        "meta",
        "sparse",
        "-100",
        "-1",
        "C",
        "huge",
    ],
)
def test_wrong_labels(name, wrong):
    (x, y), model = batch(), network()
    if (
        name == NEEDS_NO_LABELS
        and torch.is_tensor(wrong(y))
        and wrong(y).is_cpu
        and wrong(y).to_dense().max() >= CLASSES
    ):
        return
    refused(name, "y", model, x, wrong(y))


@over_every
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (255 * x).byte(),
        lambda x: x.numpy(),
        lambda x: None,
        lambda x: x[0, 0, 0, 0],
        lambda x: x.clone().index_fill_(0, torch.tensor([2]), math.nan),
        lambda x: x.clone().index_fill_(0, torch.tensor([2]), math.inf),
        lambda x: x.clone().index_fill_(0, torch.tensor([2]), -math.inf).half(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to_sparse(),
    ],
    ids=["bytes", "numpy", "None", "scalar", "nan", "inf", "-inf", "complex", "float8", "sparse"],
)
def test_wrong_images(name, wrong):
    x, y = batch()
    refused(name, "x", network(), wrong(x), y)


@over_losses
@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_wrong_probabilities(name, wrong):
    x, y = batch()
    soft = nn.functional.one_hot(y, CLASSES).float()
    soft[2, 1] = wrong
    refused(name, "y", network(), x, soft)


@over_every
def test_images_outside_the_box_are_told_to_their_last_digit(name):
    """By every class that looks for adversaries in the box; a derivative needs no box."""
    x, y = batch()
    x[0, 0, 0, 0] = 1.0000002
    if name in ("VAT", "TRADES", "MART", "ALP", "AWP", "LocalLinearity", "GradAlign", "AdversarialTraining", *ATTACKS):
        assert "to 1.00000024;" in refused(name, "x", network(), x, y)
        assert "to 1.00000024;" not in refused(name, "x", network(), 255 * x, y)
    else:
        assert EVERY[name]()(network(), x, y).total.isfinite()


class WithoutGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


@over_every
@pytest.mark.parametrize(
    "model",
    [
        lambda: None,
        lambda: "resnet",
        lambda: network(1),
        lambda: nn.Flatten(0),
        lambda: nn.Identity(),
        lambda: lambda x: None,
        lambda: lambda x: (network()(x), x),
        lambda: lambda x: network()(x)[:3],
        lambda: lambda x: network()(x).argmax(1, keepdim=True).expand(-1, CLASSES),
    ],
    ids=["None", "text", "one logit", "vector", "images", "nothing", "tuple", "few", "integers"],
)
def test_wrong_models(name, model):
    refused(name, "model", model(), *batch())


@over_every
@pytest.mark.parametrize("model", [WithoutGraph(), lambda x: network()(x.detach())], ids=["no_grad", "detached"])
def test_a_model_without_a_graph(name, model):
    if name in ONLY_MODULES and not isinstance(model, nn.Module):
        return

    def trained():
        found = EVERY[name]()(model, *batch())
        if isinstance(model, nn.Module) or not found.total.requires_grad:
            found.backward()
        return found

    needs_images = name not in ("CrossEntropy", "LabelSmoothing", "Distillation")
    if not needs_images and not isinstance(model, nn.Module):
        assert trained().total.requires_grad  # its parameters have a graph, which is enough
        return
    with pytest.raises((TypeError, ValueError)) as error:
        trained()
    one_sentence(error, "(model|loss|outputs|total)")


@over_every
@pytest.mark.parametrize("kind", ["lambda", "method", "exported", "compiled graph", "scripted"])
@pytest.mark.filterwarnings("ignore")
def test_any_callable_is_a_model(name, kind):
    (x, y), net = batch(), network()
    models = {
        "lambda": lambda: lambda v: net(v),
        "method": lambda: net.forward,
        "exported": lambda: torch.export.export(net, (x,)).module(),
        "compiled graph": lambda: torch.fx.symbolic_trace(net),
        "scripted": lambda: torch.jit.trace(net, x),
    }
    model = models[kind]()
    if name == "CrossLipschitz of a part":  # for a function it takes the whole batch, and draws for all of it
        assert EVERY[name]()(model, x, y).total.isfinite()
        return
    if name in ONLY_MODULES and (kind == "scripted" or not isinstance(model, nn.Module)):
        assert "nn.Module" in refused(name, "model", model, x, y)
        return
    torch.testing.assert_close(result(EVERY[name](), model, x, y), result(EVERY[name](), net, x, y))


@pytest.mark.filterwarnings("ignore")
def test_an_exported_part_leaves_the_others_their_eval_mode():
    from robustkern.attacks import attacked

    x, _ = batch()
    exported = torch.export.export(nn.Flatten().eval(), (x,)).module()
    model = nn.Sequential(exported, nn.Linear(48, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout()), nn.Linear(8, 5))
    with attacked(model):
        assert not any(module.training for part in list(model)[1:] for module in part.modules())
    assert all(module.training for part in list(model)[1:] for module in part.modules())


@over_losses
def test_a_function_of_a_network_is_trained_as_the_network_is(name):
    (x, y), net = batch(), network()
    if name in (*ONLY_MODULES, "CrossLipschitz of a part"):
        return
    gradients = []
    for model in (net, lambda v: net(v)):
        net.zero_grad()
        torch.manual_seed(3)
        terms = EVERY[name]()(model, x, y)
        terms._replace(weight=0.5).backward(inputs=net.parameters())  # whatever weight a ramp sets
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].any()


@over_every
@pytest.mark.parametrize("generator", [0, 1.5, "cpu", torch.Generator], ids=str)
def test_wrong_generators(name, generator):
    (x, y), made = batch(), EVERY[name]()
    if name in ATTACKS:
        refused(name, "generator", network(), x, y, generator)
        return
    for argument, draw in (("generator", Draw(generator)), ("draw", generator)):
        with pytest.raises(TypeError) as error:
            made(network(), x, y, draw)
        one_sentence(error, argument)


@over_attacks
@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5], torch.arange(5), torch.arange(6.0), 3], ids=str)
def test_wrong_indices(name, indices):
    refused(name, "indices", network(), *batch(), indices=indices)


# --- options ----------------------------------------------------------------------------------------------------------

NUMBERS = [
    "a",
    None,
    [],
    {},
    math.nan,
    math.inf,
    -1,
    -0.5,
    10**400,
    10**5000,
    1 + 2j,
    np.array(["a"]),
    torch.tensor([math.nan]),
]
WRONG = {
    "eps": [*NUMBERS, True, [0.1, -0.1], np.array([math.inf]), torch.ones(3, dtype=torch.bool)],
    "step_size": [0, *(v for v in NUMBERS if v is not None)],
    "p": [0.5, 0, *(v for v in NUMBERS if v is not math.inf)],
    "steps": [0, 2.5, True, np.float64(2.0), *NUMBERS],
    "projections": [0, 2.5, True, *NUMBERS],
    "fraction": [0, 1.5, *NUMBERS],
    "label_smoothing": [1.5, *NUMBERS],
    "weight": NUMBERS,
    "xi": [0, *NUMBERS],
    "targeted": ["no", "", 0, 1, None, [], torch.tensor(True)],
    "impl": ["", "fast", None, 0, ["auto"]],
    "orientation": [0.1, "cross-entropy"],
    "attack": [None, 0.1, "pgd"],
}
WRONG |= dict.fromkeys(("restarts", "coordinates", "every"), WRONG["steps"])
WRONG |= dict.fromkeys(("random_start", "early_exit", "squared"), WRONG["targeted"])
WRONG |= dict.fromkeys(("ratio", "gamma", "noise"), WRONG["weight"])
WRONG |= dict.fromkeys(("h", "temperature"), WRONG["xi"])
WRONG |= dict.fromkeys(("law", "norm", "loss", "start", "estimator"), WRONG["impl"])
CHECKED_ELSEWHERE = {"teacher"}  # by the loss itself


@over_every
def test_wrong_options(name):
    made, tried = EVERY[name](), 0
    for field in dataclasses.fields(made):
        if field.name in CHECKED_ELSEWHERE:
            continue
        checked = field.name in _CHECKS or field.name in _CHOICES or isinstance(field.default, str)
        assert checked, f"add {field.name} to _CHECKS of robustkern/_options.py, or check it in {type(made).__name__}"
        assert field.name in WRONG, f"add values that {field.name} must refuse to WRONG of tests/test_misuse.py"
        for value in WRONG[field.name]:
            with pytest.raises((TypeError, ValueError)) as error:
                pytest.fail(f"{dataclasses.replace(made, **{field.name: value})}")
            one_sentence(error, field.name)
            tried += 1
    assert tried


@over_every
def test_grey_levels_are_not_radii(name):
    """Where eps is the radius of a ball in the box: 8 instead of 8/255 would reach every image."""
    make, boxed = EVERY[name], {*ATTACKS, "TRADES", "MART", "LocalLinearity", "GradAlign"}
    options = {field.name for field in dataclasses.fields(make())}
    if name in boxed and getattr(make(), "norm", "linf") == "linf":
        for option in options & {"eps", "step_size"}:
            with pytest.raises(ValueError, match=rf"{option} must be at most 1, .*, got 8\.0; write 8/255"):
                make(**{option: 8})
    elif name in boxed:
        diameter = {"l2": "6.9282", "l1": "48"}[make().norm]
        with pytest.raises(ValueError, match=f"eps must be at most {diameter}, the {make().norm} diameter"):
            make(eps=64)(network(), *batch())
    assert "eps" not in options or make(eps=1.0)


@over_every
def test_options_are_checked_wherever_tensors_are_made(name):
    with torch.device("meta"):
        EVERY[name]()


@over_every
@pytest.mark.parametrize("kind", [np.float32, np.array, lambda e: [e], lambda e: np.full((1, 1, 1), e), torch.tensor])
def test_radii_of_every_kind(name, kind):
    if not any(field.name == "eps" for field in dataclasses.fields(EVERY[name]())):
        return
    (x, y), model = batch(), network()
    radius = kind(0.25)
    torch.testing.assert_close(result(EVERY[name](eps=radius), model, x, y), result(EVERY[name](eps=0.25), model, x, y))
