"""What a run can be told beyond its method: schedules, averages, validation, bfloat16, TensorBoard."""

import copy
import dataclasses
import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")

from typer.testing import CliRunner

from robustkern import data as datasets
from robustkern import models, training
from robustkern.cli.app import app
from robustkern.data import DataError
from robustkern.terms import Terms
from robustkern.training import METHODS, WeightAverage, recipe, train
from robustkern.training import trainer as trainer_module
from robustkern.training import validation as validation_module
from robustkern.training.feed import Feed
from robustkern.training.schedule import learning_rate
from robustkern.training.step import Stepper
from robustkern.training.validation import overfitting, split

pytestmark = pytest.mark.usefixtures("no_figures")


def tiny(method="standard", **given):
    """A run of a fraction of a second: twelve steps."""
    defaults = {"epochs": 3, "batch_size": 32, "train_samples": 160, "eval_samples": 30, "pgd_steps": 2, "threads": 1}
    return recipe("digits", method, **{**defaults, **given})


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_triangular_rises_and_falls_in_equal_steps_and_is_never_zero(steps):
    rates = [learning_rate("triangular", 0.2, step, steps) for step in range(steps)]
    assert rates == pytest.approx(rates[::-1]) and min(rates) > 0 and max(rates) <= 0.2
    half = rates[: (steps + 1) // 2]
    assert all(rate == pytest.approx((i + 1) * rates[0]) for i, rate in enumerate(half))
    if steps % 2:
        assert max(rates) == pytest.approx(0.2)


def test_step_schedule_falls_at_its_milestones():
    rates = [learning_rate("step", 1.0, step, 30, milestones=(1 / 3, 2 / 3), gamma=0.5) for step in range(30)]
    assert rates == [1.0] * 10 + [0.5] * 10 + [0.25] * 10
    usual = [learning_rate("step", 1.0, step, 8) for step in range(8)]
    assert usual == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)


@pytest.mark.parametrize(
    "given", [{"schedule": "triangular"}, {"schedule": "step", "milestones": (1, 2), "gamma": 0.5}]
)
def test_a_run_follows_its_schedule(tmp_path, monkeypatch, given):
    used = []
    step = torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    rows = train(tiny(lr=0.08, **given), tmp_path).rows
    if given["schedule"] == "step":
        assert used == [0.08] * 5 + [0.04] * 5 + [0.02] * 5
    else:
        assert used == [learning_rate("triangular", 0.08, step, 15) for step in range(15)]
    assert [row["learning_rate"] for row in rows] == used[4::5]


# --- average of the weights -------------------------------------------------------------------------------------------


def test_average_is_the_documented_recursion_and_copies_buffers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()
    average = WeightAverage(model, 0.5)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for t in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 2, dtype=torch.float64))
        average.update(model)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(expected, model.parameters(), strict=True)]
    for mine, theirs in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not mine.requires_grad
    for mine, theirs in zip(average.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs
    assert average.updates == 12 and not average.model.training
    with pytest.raises(ValueError, match="decay must be in"):
        WeightAverage(model, 1.0)


def test_average_is_measured_and_saved_beside_the_weights(tmp_path):
    result = train(tiny(ema=0.9), tmp_path)
    plain = train(tiny(), tmp_path / "plain")
    raw, _ = training.load_model(tmp_path)
    averaged, header = training.load_model(tmp_path / "ema.safetensors")
    assert header["epoch"] == 3
    for name, value in plain.model.state_dict().items():
        assert torch.equal(raw.state_dict()[name], value)  # the average changes nothing of the training
    assert any(not torch.equal(raw.state_dict()[name], value) for name, value in averaged.state_dict().items())
    test = datasets.load("digits", split="test")
    assert result.rows[-1]["ema_clean_accuracy"] == training.clean_accuracy(averaged, test)
    assert result.accuracies["ema"]["clean_accuracy"] == result.rows[-1]["ema_clean_accuracy"]
    assert result.accuracies["last"]["robust_accuracy"] == result.rows[-1]["robust_accuracy"]


# --- validation -------------------------------------------------------------------------------------------------------


def test_split_is_a_partition_by_the_seed():
    data = datasets.load("digits")
    for validation, count in ((0.1, round(0.1 * len(data))), (50, 50)):
        kept, held_out = split(data, validation, seed=3)
        assert len(held_out) == count and len(kept) == len(data) - count
        rows = torch.cat([kept.images, held_out.images]).flatten(1)
        assert torch.equal(rows.unique(dim=0), data.images.flatten(1).unique(dim=0))
        again, other = split(data, validation, seed=3)[1], split(data, validation, seed=4)[1]
        assert torch.equal(held_out.images, again.images) and not torch.equal(held_out.images, other.images)
    assert split(data, 0.0, seed=3) == (data, None)
    for validation in (len(data), 1e-9):
        with pytest.raises(DataError, match="some must be left on either side"):
            split(data, validation, seed=3)


def scripted(monkeypatch, robust, clean=0.9, fgsm=0.1):
    """Makes accuracies as given, one robust accuracy for each call of the attack; all else is unchanged."""
    values, seen = iter(robust), []

    def robust_accuracy(model, data, attack, **kwargs):
        if type(attack).__name__ == "FGSM":
            return fgsm
        seen.append(len(data))
        return next(values)

    monkeypatch.setattr(validation_module, "robust_accuracy", robust_accuracy)
    monkeypatch.setattr(validation_module, "clean_accuracy", lambda *args, **kwargs: clean)
    return seen


class _States(training.Observer):
    """The weights after each epoch."""

    def __init__(self):
        self.states, self.messages, self.run = [], [], None

    def on_step(self, progress):
        self.steps = progress.step

    def on_message(self, message):
        self.messages.append(message)


def test_best_weights_are_those_of_the_best_validation_accuracy(tmp_path, monkeypatch):
    states = []
    run = trainer_module._Run

    def end_epoch(self, original=run._end_epoch):
        original(self)
        states.append(copy.deepcopy(self.model.state_dict()))

    monkeypatch.setattr(run, "_end_epoch", end_epoch)
    # Once after each epoch, on the validation set; at the end on the test set, for the last weights and the best.
    seen = scripted(monkeypatch, [0.4, 0.5, 0.5, 0.31, 0.32])
    result = train(tiny(validation=32, eval_samples=20), tmp_path)
    assert seen == [20] * 5
    best, header = training.load_model(tmp_path / "best.safetensors")
    assert all(torch.equal(value, states[1][name]) for name, value in best.state_dict().items())
    assert any(not torch.equal(value, states[2][name]) for name, value in best.state_dict().items())
    assert header["epoch"] == 2 and header["validation_robust_accuracy"] == 0.5
    assert result.accuracies == {
        "last": {"epoch": 3, "clean_accuracy": 0.9, "robust_accuracy": 0.31},
        "best": {
            "epoch": 2, "weights": "last", "validation_clean_accuracy": 0.9, "validation_robust_accuracy": 0.5,
            "clean_accuracy": 0.9, "robust_accuracy": 0.32,
        },
    }  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["weights"] == result.accuracies
    for row in result.rows:  # no look at the test images while there is a choice
        assert row["clean_accuracy"] is None is row["robust_accuracy"] and row["validation_clean_accuracy"] == 0.9


def test_validation_images_are_never_trained_on_nor_test_images_chosen_by(tmp_path, monkeypatch):
    trained, judged = [], []
    batch = Feed.batch
    monkeypatch.setattr(
        Feed, "batch", lambda self, i, *more: trained.append(self.data.images[i]) or batch(self, i, *more)
    )
    clean = validation_module.clean_accuracy
    monkeypatch.setattr(
        validation_module, "clean_accuracy", lambda m, data, **kw: judged.append(data.images) or clean(m, data, **kw)
    )
    train(tiny(validation=0.25, epochs=2), tmp_path)
    rows = lambda images: {bytes(image.numpy()) for image in images}  # noqa: E731
    held_out, test = rows(judged[0]), rows(datasets.load("digits", split="test").images)
    assert len(held_out) == 40 and not held_out & rows(torch.cat(trained))
    assert [len(images) for images in judged] == [40, 40, len(test), len(test)]
    assert rows(judged[-1]) == test


def test_best_may_be_the_average(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.3, 0.4, 0.35, 0.4, 0.1, 0.2, *[0.0] * 3])
    result = train(tiny(validation=32, ema=0.5), tmp_path)
    assert result.accuracies["best"]["weights"] == "ema" and result.accuracies["best"]["epoch"] == 1
    assert set(result.accuracies) == {"last", "ema", "best"}
    assert result.rows[0]["validation_ema_robust_accuracy"] == 0.4


# --- catastrophic overfitting -----------------------------------------------------------------------------------------


def test_signs_of_catastrophic_overfitting():
    rows = [{"robust_accuracy": 0.5}, {"robust_accuracy": None}]
    assert overfitting(0.31, None, rows, "robust_accuracy") is None
    assert overfitting(0.29, None, rows, "robust_accuracy") == "PGD accuracy fell from 50.0% to 29.0%"
    assert overfitting(0.01, None, [], "robust_accuracy") is None
    assert overfitting(0.1, 0.39, [], "robust_accuracy") is None
    assert overfitting(0.05, 0.9, [], "robust_accuracy") == "FGSM accuracy is 90.0%, PGD accuracy 5.0%"


@pytest.mark.parametrize("watch", ["warn", "stop", "off"])
def test_watch_warns_or_stops(tmp_path, monkeypatch, watch):
    scripted(monkeypatch, [0.6, 0.2, 0.2, 0.1, 0.1])
    observer = _States()
    result = train(tiny(validation=32, watch=watch), tmp_path, observer=observer)
    if watch == "off":
        assert not observer.messages and "overfitting" not in result.rows[1]
        return
    assert len(observer.messages) == 1 and "epoch 2 looks like catastrophic overfitting" in observer.messages[0]
    assert [row["overfitting"] for row in result.rows] == ([0.0, 1.0] if watch == "stop" else [0.0, 1.0, 0.0])
    assert json.loads((tmp_path / "results.json").read_text())["overfitting_stopped"] == (watch == "stop")
    assert result.accuracies["best"]["epoch"] == 1
    if watch == "stop":  # and stays stopped
        scripted(monkeypatch, [0.1, 0.1])
        assert len(train(tiny(validation=32, watch=watch), tmp_path, resume=True).rows) == 2


def test_single_step_methods_are_attacked_by_a_single_step_too(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "standard", dataclasses.replace(METHODS["standard"], single_step=True))
    scripted(monkeypatch, [0.1] * 9, fgsm=0.8)
    observer = _States()
    rows = train(tiny(epochs=1), tmp_path, observer=observer).rows
    assert rows[0]["fgsm_accuracy"] == 0.8 and rows[0]["overfitting"] == 1.0
    assert "FGSM accuracy is 80.0%" in observer.messages[0]


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["standard", "gradient-penalty", "jacobian"])
def test_bfloat16_runs_the_network_and_nothing_else_in_bfloat16(tmp_path, monkeypatch, method):
    seen = {}
    take, forward = Stepper._terms, models.SmallCNN.forward

    def terms(self, *args):
        result = take(self, *args)
        seen["terms"] = {result.orientation.dtype, result.smoothness.dtype}
        return result

    def watched(self, x):
        logits = forward(self, x)
        if self.training:
            seen["logits"] = logits.dtype
        else:
            seen["evaluated"] = logits.dtype
        return logits

    monkeypatch.setattr(Stepper, "_terms", terms)
    monkeypatch.setattr(models.SmallCNN, "forward", watched)
    result = train(tiny(method, amp=True, lr=0.02), tmp_path)
    assert seen == {"terms": {torch.float32}, "logits": torch.bfloat16, "evaluated": torch.float32}
    assert {value.dtype for value in result.model.state_dict().values()} == {torch.float32}
    whole = train(tiny(method, lr=0.02), tmp_path / "float32")
    for mine, theirs in zip(result.rows, whole.rows, strict=True):
        assert mine["orientation"] == pytest.approx(theirs["orientation"], rel=0.1)
        assert mine["orientation"] != theirs["orientation"]


def test_a_forward_pass_without_gradients_does_not_take_them_from_the_next():
    """Autocast's cache of cast weights would."""
    config = tiny(amp=True)
    model = models.create("small-cnn", 10, (1, 8, 8))

    class Peeks:
        def __call__(self, model, x, y, draw):
            with torch.no_grad():
                model(x)
            loss = torch.nn.functional.cross_entropy(model(x).float(), y)
            return Terms(loss, loss.new_zeros(()), 0.0)

    group, shard = training.distributed.Group(), trainer_module.Shard(0, 4, 4)
    before = copy.deepcopy(model.state_dict())
    stepper = Stepper(config, model, torch.optim.SGD(model.parameters(), lr=0.1), Peeks(), group)
    stepper.take(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), shard, 3, 10)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters()}


# --- what is not finite -----------------------------------------------------------------------------------------------


def test_a_skipped_step_leaves_batch_norm_as_it_was():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())

    def loss(model, x, y, draw):
        return Terms(model(x).sum() * float("inf"), x.new_zeros(()), 0.0)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stepper = Stepper(tiny(), model, optimizer, loss, training.distributed.Group())
    outcome = stepper.take(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), trainer_module.Shard(0, 3, 3), 0, 10)
    assert not outcome.finite
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_number_of_every_row(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = training.tensorboard.TensorBoard(tmp_path)
    rows = train(tiny(), tmp_path, observer=training.Observers(observer, _States())).rows
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {name for name in rows[0] if name != "step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(row["step"], pytest.approx(row[name])) for row in rows]


def test_tensorboard_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    result = CliRunner().invoke(app, ["train", "--tensorboard", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "pip install tensorboard" in result.stderr and not (tmp_path / "run").exists()
