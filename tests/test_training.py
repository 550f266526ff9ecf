"""Training: it learns, it measures, it refuses what makes no sense, and it never saves what is not finite."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from robustkern import data as datasets
from robustkern import models, training
from robustkern.attacks import PGD
from robustkern.training import METHODS, TrainingConfig, TrainingError, UsageError, recipe, train
from robustkern.training import trainer as trainer_module
from robustkern.training.run_folder import RunFolder
from robustkern.training.schedule import learning_rate, weight_factor


def small(method="standard", **given):
    """A run of two seconds."""
    defaults = {"epochs": 2, "batch_size": 32, "eval_samples": 60, "pgd_steps": 3, "threads": 1, "ramp": 0.5}
    return recipe("digits", method, **{**defaults, **given})


@pytest.mark.parametrize("method", list(METHODS))
def test_two_epochs_learn_and_leave_a_complete_run(tmp_path, method, monkeypatch):
    drawn = method in ("standard", "gradient-penalty")  # the figures of other methods are made in the same way
    if not drawn:
        monkeypatch.setattr(RunFolder, "draw", lambda *_: None)
    options = {"weight": 0.3} if "weight" in METHODS[method].options else {}
    if "steps" in METHODS[method].options:
        options["steps"] = 2
    if method == "distillation":
        teacher = train(small(epochs=2), tmp_path / "teacher").out
        options = {"teacher": str(teacher), "temperature": 2.0}
    result = train(small(method, options=options), tmp_path / "run")
    last = result.rows[-1]
    assert last["clean_accuracy"] > 0.6 and last["orientation"] < result.rows[0]["orientation"]
    assert (last["smoothness"] > 0) == (METHODS[method].smoothness is not None)
    assert 0 <= last["robust_accuracy"] <= last["clean_accuracy"] + 0.1 and last["ms_per_step"] > 0
    written = {path.name for path in result.out.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "model.safetensors"} <= written
    assert drawn == ({"curves.png", "gradients.png"} <= written)
    assert not [name for name in written if name.startswith(".tmp-")]
    assert [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()] == result.rows
    model, description = training.load_model(result.out)
    images = datasets.load("digits", split="test").images
    assert torch.equal(model(images), result.model(images)) and not model.training
    assert description["classes"] == [str(digit) for digit in range(10)] and description["method"] == method


@pytest.mark.usefixtures("no_figures")
def test_runs_are_reproducible_and_seeds_differ(tmp_path):
    torch.manual_seed(5)
    first = train(small("gradient-penalty", epochs=1), tmp_path / "a")
    torch.manual_seed(6)  # the run must not notice the global generator, nor move it
    before = torch.get_rng_state()
    second = train(small("gradient-penalty", epochs=1), tmp_path / "b")
    assert torch.equal(before, torch.get_rng_state())
    assert (first.out / "model.safetensors").read_bytes() == (second.out / "model.safetensors").read_bytes()
    logs = [[{**row, "ms_per_step": None} for row in result.rows] for result in (first, second)]
    assert logs[0] == logs[1]
    other = train(small("gradient-penalty", epochs=1, seed=1), tmp_path / "c")
    assert other.rows[0]["orientation"] != first.rows[0]["orientation"]


@pytest.mark.usefixtures("no_figures")
def test_penalty_makes_the_loss_smoother(tmp_path):
    rows = {}
    for weight in (0.0, 1.0):
        config = small("gradient-penalty", ramp=0.0, options={"weight": weight})
        rows[weight] = train(config, tmp_path / str(weight)).rows[-1]
    assert rows[1.0]["smoothness"] < 0.8 * rows[0.0]["smoothness"]


@pytest.mark.usefixtures("no_figures")
def test_smoothness_is_the_mean_over_the_steps_that_measured_it(tmp_path):
    rows = {}
    for every in (1, 6):
        config = small("jacobian", epochs=1, ramp=0.0, options={"weight": 1e-6, "projections": 0, "every": every})
        rows[every] = train(config, tmp_path / str(every)).rows[0]
    assert rows[6]["smoothness"] == pytest.approx(rows[1]["smoothness"], rel=0.3)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("given", [{"optimizer": "adamw", "lr": 3e-3}, {"schedule": "cosine"}, {"clip": 0.0}])
def test_optimizers_and_schedules(tmp_path, given):
    result = train(small(**given), tmp_path)
    assert result.rows[-1]["clean_accuracy"] > 0.6


@pytest.mark.usefixtures("no_figures")
def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    train(small(epochs=1, train_samples=64), tmp_path)
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("no_figures")
def test_robust_accuracy_is_measured_as_often_as_asked_and_at_the_end(tmp_path):
    rows = train(small(epochs=5, train_samples=64, eval_every=2, eval_samples=10), tmp_path).rows
    assert [row["robust_accuracy"] is None for row in rows] == [True, False, True, False, False]


# --- what is not finite -----------------------------------------------------------------------------------------------


class _Poisoned:
    """A loss whose value or gradient is not finite at some calls."""

    def __init__(self, loss, at, kind):
        self.loss, self.at, self.kind, self.calls = loss, at, kind, 0

    def __call__(self, model, x, y, draw):
        terms = self.loss(model, x, y, draw)
        self.calls += 1
        if self.calls - 1 not in self.at:
            return terms
        if self.kind == "loss":
            return terms._replace(orientation=terms.orientation * math.nan)
        # sqrt has an infinite slope at 0: a finite loss with a gradient that is not.
        parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        return terms._replace(orientation=terms.orientation + (parameter * 0).sum().abs().sqrt())


def poison(monkeypatch, at, kind):
    build = training.build_loss
    monkeypatch.setattr(
        trainer_module, "build_loss", lambda *args, **kwargs: _Poisoned(build(*args, **kwargs), set(at), kind)
    )


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped(tmp_path, monkeypatch, kind):
    poison(monkeypatch, (3, 4, 7), kind)
    seen = []

    class Watch(training.Observer):
        def on_step(self, progress):
            seen.append(progress.skipped)

    result = train(small(epochs=1, max_skipped=2), tmp_path, observer=Watch())
    assert seen[:9] == [0, 0, 0, 1, 2, 0, 0, 1, 0]
    assert result.rows[0]["skipped"] == 3 and math.isfinite(result.rows[0]["orientation"])
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_too_many_in_a_row_end_the_run_and_leave_the_checkpoint(tmp_path, monkeypatch, kind):
    config = small(epochs=2, max_skipped=3, checkpoint_every=5)
    poison(monkeypatch, range(12, 99), kind)
    with pytest.raises(
        TrainingError, match=r"not finite 4 steps in a row .*step 16, .*not-finite.json has its samples"
    ):
        train(config, tmp_path)
    record = json.loads((tmp_path / "not-finite.json").read_text())
    assert (
        record["step"] == 16
        and record["samples"] == datasets.epoch_order(0, 0, len(datasets.load("digits")))[480:512].tolist()
    )
    monkeypatch.undo()
    monkeypatch.setattr(RunFolder, "draw", lambda *_: None)
    # The last checkpoint is from step 15, three skipped steps after the last good one; training goes on from there.
    result = train(config, tmp_path, resume=True)
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_a_finite_step_fails_and_says_nothing_of_its_terms(tmp_path, monkeypatch):
    poison(monkeypatch, range(99), "loss")
    config = small(epochs=3, train_samples=64, max_skipped=9)
    for resume in (False, True):  # resumed, it fails again
        with pytest.raises(TrainingError, match="nothing was learnt: .* not finite in any of the 6 steps"):
            train(config, tmp_path, resume=resume)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["orientation"], row["smoothness"], row["skipped"]) for row in rows] == [(None, None, 2.0)] * 3
    assert not (tmp_path / "results.json").exists()


def test_an_epoch_without_a_finite_step_has_no_terms(tmp_path, monkeypatch):
    """An epoch in the middle, whose numbers are neither zero nor another epoch's; the figures leave a gap."""
    poison(monkeypatch, (2, 3), "gradient")
    result = train(small(epochs=3, train_samples=64), tmp_path)
    assert [row["orientation"] is None for row in result.rows] == [False, True, False]
    assert (tmp_path / "curves.png").exists()


@pytest.mark.usefixtures("no_figures")
def test_an_epoch_without_a_penalised_step_has_no_smoothness(tmp_path):
    config = small("gradient-penalty", epochs=4, train_samples=32, options={"every": 3})
    assert [row["smoothness"] is None for row in train(config, tmp_path).rows] == [False, True, True, False]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = models.create("small-cnn", 10, (1, 8, 8))
    with torch.no_grad():
        next(iter(model.network.parameters()))[0] = math.inf
    with pytest.raises(TrainingError, match=r"network\.features\.0\.weight is not finite"):
        training.save_weights(tmp_path / "model.safetensors", model, {})
    assert list(tmp_path.iterdir()) == []


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_survives_yaml():
    given = {"lr": 1, "eps": 1 / 3, "weight_decay": 5e-324, "schedule": "step", "milestones": (3, 5), "amp": True}
    config = recipe("digits", "gradient-penalty", options={"norm": math.inf}, **given)
    assert TrainingConfig.from_yaml(config.to_yaml()) == config
    assert TrainingConfig.from_yaml(recipe("digits").to_yaml()) == recipe("digits")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not YAML in line 1"),
        ("- a", "expected a mapping of settings, got list"),
        ("", "expected a mapping of settings, got NoneType"),
        ("data: digits", "missing setting method"),
        ("data: digits\nmethod: standard\nlearning_rate: 1", "unknown setting learning_rate"),
        ("data: digits\nmethod: standard\nepochs: '3'", "epochs must be int"),
        ("data: digits\nmethod: standard\nepochs: true", "epochs must be int"),
        ("data: digits\nmethod: standard\namp: 1", "amp must be bool"),
        ("data: digits\nmethod: standard\nepochs: 0", "epochs must be an integer from 1 to 2147483647, got 0"),
        ("data: digits\nmethod: standard\neps: 8/x", "'8/x' is neither a number nor a fraction"),
        ("data: digits\nmethod: standard\nmilestones: 3", "milestones must be tuple"),
        ("data: digits\nmethod: standard\nmilestones: [a]", "milestones must be a list of epochs"),
        ("data: digits\ndata: digits\nmethod: standard", "not YAML in line 2 .data stands twice"),
        ("data: !!python/object/apply:os.getcwd []\nmethod: standard", "tags are not read"),
    ],
)
def test_configurations_that_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        TrainingConfig.from_yaml(text)


def test_numbers_in_yaml_are_numbers():
    config = TrainingConfig.from_yaml("data: digits\nmethod: standard\neps: 8/255\nweight_decay: 5e-4\nlr: 1.e1")
    assert (config.eps, config.weight_decay, config.lr) == (8 / 255, 5e-4, 10.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"eps": 8}, r"eps must be a number in \(0, 1\] in units of images in \[0, 1\], such as 8/255, got 8"),
        ({"lr": 0.0}, r"lr must be a number in \(0, inf\), got 0.0"),
        ({"optimizer": "lion"}, "no optimizer"),
        ({"schedule": "linear"}, "no schedule"),
        ({"schedule": "step", "milestones": (5, 3)}, "milestones must be ascending epochs from 1 to 39"),
        ({"schedule": "step", "milestones": (40,)}, "milestones must be ascending epochs"),
        ({"milestones": (3,)}, "milestones belong to schedule step"),
        ({"gamma": 0.0}, "gamma must be a number in"),
        ({"ema": 1.0}, "ema must be a number in"),
        ({"validation": 2.5}, "validation must be a share below 1 or a number"),
        ({"watch": "loudly"}, "watch must be one of"),
        ({"watch": "stop"}, "watch stop takes a validation set"),
        ({"sync_batch_norm": True}, "sync_batch_norm takes device cuda"),
        ({"lr": math.inf}, "lr must be a number"),
        ({"ramp": 2.0}, "ramp"),
        ({"impl": "cuda"}, "impl"),
        ({"clip": -1.0}, "clip"),
        ({"amp": "no"}, "amp must be bool, got 'no'"),
        ({"optimizer": 0}, "optimizer must be str, got 0"),
        ({"schedule": "step", "milestones": [3]}, r"milestones must be tuple\[int, ...\], got \[3\]"),
        ({"epochs": 2.0}, "epochs must be an integer from 1 to 2147483647, got 2.0"),
        ({"seed": 2**63}, "seed must be an integer from 0 to 9223372036854775807"),
        ({"threads": 1025}, "threads must be an integer from 1 to 1024, got 1025"),
        ({"validation": math.inf}, "validation must be a number in"),
        ({"options": {"beta": 6.0}}, "has no option beta"),
        ({"options": {"label_smoothing": "much"}}, "must be a number"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        recipe("digits", "standard", **given)


@pytest.mark.parametrize(
    "changed, message",
    [({"method": "magic"}, "no method"), ({"model": "vgg"}, "no model"), ({"data": "imagenet"}, "no data set"),
     ({"options": {"norm": 0.5}, "method": "gradient-penalty"}, "norm must be 1, 2, inf")],
)  # fmt: skip
def test_names_that_are_refused(tmp_path, changed, message):
    config = dataclasses.replace(recipe("digits"), **{"options": {}, **changed})
    with pytest.raises(UsageError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_data_set_leaves_no_run_behind(tmp_path):
    with pytest.raises(datasets.DataError, match="not found"):
        train(recipe("cifar10"), tmp_path / "run", root=tmp_path)
    assert not (tmp_path / "run").exists()


def test_every_recipe_is_valid():
    for data in (*datasets.NAMES, "some/folder"):
        for method in METHODS:
            config = recipe(data, method)
            assert set(config.options) == set(METHODS[method].options)
            if method == "distillation":
                continue  # it needs a network
            training.build_loss(method, config.options, eps=config.eps, impl="reference")


def test_schedules():
    for name in ("one-cycle", "cosine"):
        rates = [learning_rate(name, 0.1, step, 40) for step in range(40)]
        assert max(rates) == pytest.approx(0.1) and min(rates) > 0 and rates[-1] < 0.001
        peak = rates.index(max(rates))
        assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
        assert len({learning_rate(name, 0.1, 0, steps) > 0 for steps in (1, 2, 3, 4, 5)}) == 1
    assert learning_rate("constant", 0.1, 3, 4) == 0.1
    factors = [weight_factor(0.5, step, 8) for step in range(8)]
    assert factors == sorted(factors) and 0 < factors[0] < factors[2] < 1 and factors[3:] == [1.0] * 5
    assert weight_factor(0.0, 0, 8) == 1.0


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_accuracies_agree_with_counting_and_with_each_other():
    torch.manual_seed(0)
    model = models.create("small-cnn", 10, (1, 8, 8)).train()
    test = datasets.load("digits", split="test")
    clean = training.clean_accuracy(model, test)
    with torch.no_grad():
        assert clean == pytest.approx(float((model(test.images).argmax(1) == test.labels).float().mean()))
    assert training.robust_accuracy(model, test, PGD(0.0, steps=1)) == pytest.approx(clean)
    robust = training.robust_accuracy(model, test, PGD(0.1, steps=3), seed=1)
    assert robust <= clean and robust == training.robust_accuracy(model, test, PGD(0.1, steps=3), seed=1)
    assert model.training


def test_input_gradients_are_those_of_the_logit():
    torch.manual_seed(0)
    model = models.create("small-cnn", 10, (1, 8, 8)).double()
    x, y = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3])
    grad = training.input_gradients(model, x, y)
    step = torch.zeros_like(x)
    step[1, 0, 4, 4] = 1e-6
    with torch.no_grad():
        above, below = (model(x + s)[1, 2] for s in (step, -step))
    assert float(grad[1, 0, 4, 4]) == pytest.approx(float(above - below) / 2e-6, rel=1e-4)
