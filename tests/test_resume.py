"""Runs that are killed, and checkpoints that are damaged: the same bits at the end, or one clear sentence."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from functools import partial

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from robustkern import models, training
from robustkern.training import CheckpointError, Interrupted, TrainingError, UsageError, recipe, train
from robustkern.training import checkpoint as checkpoint_module
from robustkern.training import files as files_module
from robustkern.training.files import write_atomically
from robustkern.training.run_folder import RunFolder

CONFIG = {"epochs": 2, "batch_size": 32, "train_samples": 192, "eval_samples": 20, "pgd_steps": 2, "threads": 1,
          "checkpoint_every": 2, "lr": 0.05}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_figures")


def config(**given):
    return recipe("digits", "gradient-penalty", **{**CONFIG, **given})


def outcome(out):
    """What must be the same: every bit of the weights, and the metrics except for times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (out / "model.safetensors").read_bytes(), [{**row, "ms_per_step": None} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda *_: None)
        train(config(), out)
    return outcome(out)


class _Crash(BaseException):
    """A power failure. Not an Exception: nothing may handle it."""


class _CrashAt(training.Observer):
    def __init__(self, step):
        self.step = step

    def on_step(self, progress):
        if progress.step == self.step:
            raise _Crash


@pytest.mark.parametrize("step", range(1, 13))
def test_crash_after_any_step(tmp_path, uninterrupted, step):
    with pytest.raises(_Crash):
        train(config(), tmp_path, observer=_CrashAt(step))
    torch.rand(3)
    train(config(), tmp_path, resume=True)
    assert outcome(tmp_path) == uninterrupted


RANDOM = {"jacobian": {"projections": 2}, "fisher": {"every": 5}, "cross-lipschitz": {"fraction": 0.3}}
OTHERS = [*(("gradient-penalty", given) for given in ({"optimizer": "adamw", "lr": 3e-3}, {"checkpoint_every": 0})),
          *((method, {"options": options, "schedule": "cosine"}) for method, options in RANDOM.items()),
          ("fisher", {"ema": 0.9, "validation": 0.2, "amp": True, "schedule": "step"})]  # fmt: skip


@pytest.mark.parametrize("method, given", OTHERS, ids=str)
def test_crash_with_other_methods_and_settings(tmp_path, method, given):
    settings = recipe("digits", method, **{**CONFIG, **given})
    train(settings, tmp_path / "whole")
    with pytest.raises(_Crash):
        train(settings, tmp_path / "crashed", observer=_CrashAt(9))
    torch.rand(3)
    train(settings, tmp_path / "crashed", resume=True)
    assert outcome(tmp_path / "crashed") == outcome(tmp_path / "whole")


@pytest.mark.long
def test_crash_at_any_file_operation(tmp_path, uninterrupted, monkeypatch):
    """Every rename, sync and removal in turn is the last thing that the process does."""
    operations = {"count": 0, "crash_at": None}

    def counted(operation):
        def wrapper(*args, **kwargs):
            operations["count"] += 1
            crash_at = operations["crash_at"]
            if crash_at is not None and operations["count"] >= crash_at:
                raise _Crash  # and so does everything after it: a dead process cleans nothing up
            return operation(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "replace", counted(os.replace))
        patch.setattr(files_module.os, "fsync", counted(os.fsync))
        patch.setattr(files_module.Path, "unlink", counted(files_module.Path.unlink))
        train(config(), tmp_path / "count")
        total = operations["count"]
        assert total > 60
        chosen = random.Random(0).sample(range(1, total + 1), 12)
        for crash_at in chosen:
            out = tmp_path / str(crash_at)
            operations.update(count=0, crash_at=crash_at)
            with pytest.raises(_Crash):
                train(config(), out)
            operations["crash_at"] = None
            train(config(), out, resume=True)
            assert outcome(out) == uninterrupted, f"crash at file operation {crash_at}"
            assert not list(out.glob(".tmp-*"))
            assert len(list(out.glob("checkpoint-*"))) == 4


def everything(out):
    """Everything that a run leaves and that must be the same, to the bit."""
    names = ("model.safetensors", "ema.safetensors", "best.safetensors", "results.json", "config.yaml")
    return outcome(out)[1], {name: (out / name).read_bytes() for name in names}


@pytest.mark.long
def test_sigkill_at_twenty_random_moments(tmp_path):
    """Killed twenty times while it works, then allowed to finish; compared with an undisturbed run."""
    # A forked child needs no new import of PyTorch, so that the kills hit the training itself.
    context = multiprocessing.get_context("fork")
    settings = config(epochs=12, train_samples=256, validation=64, ema=0.9, eval_every=3, checkpoint_every=1)

    class Tell(training.Observer):
        def __init__(self, pipe):
            self.pipe = pipe

        def on_step(self, progress):
            self.pipe.send(progress.step)

        def on_evaluation(self):
            self.pipe.send(-1)

    def start(out):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(settings, out), kwargs={"resume": True, "observer": Tell(writer)})
        process.start()
        writer.close()
        return process, reader

    whole, reader = start(tmp_path / "whole")
    out, clock, last = tmp_path / "killed", random.Random(1), 0
    for _ in range(20):
        process, pipe = start(out)
        for _ in range(clock.choice((1, 2, 3, 4))):  # steps or batches of the evaluation
            last = max(last, pipe.recv())
        time.sleep(clock.uniform(0.0, 0.02))  # and in the middle of whatever comes then: step, evaluation, file
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert last >= 12  # not all at the beginning
    finished, rest = start(out)
    for pipe in (reader, rest):
        with contextlib.suppress(EOFError):
            while True:
                pipe.recv()
    for process in (whole, finished):
        process.join(240)
        assert process.exitcode == 0
    assert everything(out) == everything(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_signals_save_and_stop(tmp_path, uninterrupted, number, moment):
    class SendSignal(training.Observer):
        steps = 0

        def on_step(self, progress):
            self.steps += 1
            if moment == "step" and progress.step == 9:
                os.kill(os.getpid(), number)

        def on_evaluation(self):
            if moment == "evaluation" and self.steps == 12:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name):
        train(config(checkpoint_every=0), tmp_path, observer=SendSignal())
    assert signal.getsignal(number) is before
    at = 9 if moment == "step" else 12
    assert (tmp_path / f"checkpoint-{at:09d}.json").exists()
    train(config(checkpoint_every=0), tmp_path, resume=True)
    assert outcome(tmp_path) == uninterrupted


def test_resuming_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    train(config(), tmp_path)
    train(config(), tmp_path, resume=True)
    assert outcome(tmp_path) == uninterrupted


def test_what_is_saved_is_not_written_again(tmp_path):
    """During that, a second signal would leave weights without a checkpoint, and the run could not resume."""
    train(config(epochs=1, checkpoint_every=0), tmp_path)
    (saved,) = tmp_path.glob("checkpoint-*.pt")
    before = saved.stat().st_ino

    class SendSignal(training.Observer):
        def on_start(self, *arguments):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config(epochs=1, checkpoint_every=0), tmp_path, resume=True, observer=SendSignal())
    assert saved.stat().st_ino == before


def test_metrics_beyond_the_checkpoint_are_cut_off(tmp_path, uninterrupted):
    with pytest.raises(_Crash):
        train(config(), tmp_path, observer=_CrashAt(9))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step": 12, "orien')
    train(config(), tmp_path, resume=True)
    assert outcome(tmp_path) == uninterrupted


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def crashed(tmp_path):
    """A run that crashed after step 9, with checkpoints of steps 6 and 8."""
    with pytest.raises(_Crash):
        train(config(), tmp_path, observer=_CrashAt(9))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*.pt")) == [
        "checkpoint-000000006.pt",
        "checkpoint-000000008.pt",
    ]
    return tmp_path


class _Messages(training.Observer):
    def __init__(self):
        self.messages, self.start = [], None

    def on_message(self, message):
        self.messages.append(message)

    def on_start(self, config, steps_per_epoch, progress):
        self.start = progress.step


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "bit flipped": (flip_a_bit, "SHA-256"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "manifest cut": (lambda path: path.with_suffix(".json").write_text('{"format": 1,'), "damaged"),
    "manifest empty": (lambda path: path.with_suffix(".json").write_text("{}"), "damaged"),
    "manifest binary": (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(crashed, uninterrupted, kind):
    damage, reason = DAMAGE[kind]
    damage(crashed / "checkpoint-000000008.pt")
    watch = _Messages()
    train(config(), crashed, resume=True, observer=watch)
    assert watch.start == 6
    assert len(watch.messages) == 1 and reason in watch.messages[0] and "\n" not in watch.messages[0]
    assert outcome(crashed) == uninterrupted


def test_no_usable_checkpoint_is_one_sentence_and_changes_nothing(crashed):
    for path in crashed.glob("checkpoint-*.pt"):
        flip_a_bit(path)
    content = {path.name: path.read_bytes() for path in crashed.iterdir() if path.name != ".lock"}
    with pytest.raises(CheckpointError, match="no checkpoint can be used") as caught:
        train(config(), crashed, resume=True)
    assert "\n" not in str(caught.value)
    assert content == {path.name: path.read_bytes() for path in crashed.iterdir() if path.name != ".lock"}


def forge(out, step, state):
    """Replace a checkpoint by another state, with a manifest that vouches for it."""
    path = out / f"checkpoint-{step:09d}.pt"
    torch.save(state, path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    content = path.read_bytes()
    manifest.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.with_suffix(".json").write_text(json.dumps(manifest))


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_bomb_with_a_valid_manifest_runs_nothing(crashed, uninterrupted):
    bomb = crashed / "exploded"
    forge(crashed, 8, {"progress": {}, "model": {}, "optimizer": _Bomb(str(bomb))})
    watch = _Messages()
    train(config(), crashed, resume=True, observer=watch)
    assert not bomb.exists()
    assert "cannot be loaded safely" in watch.messages[0] or "loaded safely" in watch.messages[0]
    assert outcome(crashed) == uninterrupted


@pytest.mark.parametrize("state", [[1, 2], {"weights": torch.zeros(2)}, {"progress": {}, "model": {}, "optimizer": {}}])
def test_forged_states_are_refused(crashed, state):
    forge(crashed, 8, state)
    watch = _Messages()
    train(config(), crashed, resume=True, observer=watch)
    assert watch.start == 6 and len(watch.messages) == 1


@pytest.mark.parametrize("value", ["high", None, [0.5]], ids=str)
def test_a_forged_record_of_the_best_is_refused(crashed, value):
    state = torch.load(crashed / "checkpoint-000000008.pt", weights_only=True)
    accuracies = dict.fromkeys(("validation_clean_accuracy", "validation_robust_accuracy"), value)
    forge(crashed, 8, state | {"progress": state["progress"] | {"best": {"epoch": 1, "weights": "last", **accuracies}}})
    watch = _Messages()
    train(config(), crashed, resume=True, observer=watch)
    assert watch.start == 6 and "it has unexpected best" in watch.messages[0]


@pytest.mark.parametrize("step", [0, 5, 13, 10**6])
def test_a_forged_step_outside_of_its_epoch_is_refused(crashed, step):
    state = torch.load(crashed / "checkpoint-000000008.pt", weights_only=True)
    forge(crashed, 8, state | {"progress": state["progress"] | {"step": step}})
    with pytest.raises(CheckpointError, match=f"step {step} of its checkpoint is not in its epoch"):
        train(config(), crashed, resume=True)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(models.MODELS, "small-cnn", partial(models.SmallCNN, width=8))
        train(config(), tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another architecture"):
        train(config(), tmp_path, resume=True)


def test_shapes_are_checked_before_anything_is_loaded(crashed):
    state = torch.load(crashed / "checkpoint-000000008.pt", weights_only=True)
    name = "network.classifier.3.bias"
    state["model"][name] = torch.zeros(7)
    forge(crashed, 8, state)
    watch = _Messages()
    train(config(), crashed, resume=True, observer=watch)
    assert watch.start == 6 and name in watch.messages[0]


def test_damaged_weights_are_refused(tmp_path):
    train(config(), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-10], content[:4], b"", content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="corrupt"):
            training.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        training.load_model(tmp_path / "nowhere.safetensors")


# --- resuming what is not the same ------------------------------------------------------------------------------------


def test_a_changed_configuration_is_refused_and_named(crashed):
    changed = config(lr=0.1, options={"weight": 0.5})
    with pytest.raises(UsageError, match=r"weight .* -> 0.5.*lr 0.05 -> 0.1"):
        train(changed, crashed, resume=True)


def test_damaged_config_is_one_sentence(crashed):
    (crashed / "config.yaml").write_text('data: "digits')
    with pytest.raises(UsageError, match="not YAML"):
        train(config(), crashed, resume=True)


def test_resume_without_a_run_starts_one(tmp_path, uninterrupted):
    train(config(), tmp_path / "new", resume=True)
    assert outcome(tmp_path / "new") == uninterrupted


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_checkpoints(tmp_path, monkeypatch, uninterrupted):
    write = write_atomically

    def full(path, content):
        if path.name == "checkpoint-000000008.pt":
            # Half of it fits.
            (path.parent / ".tmp-checkpoint-000000008.pt-a1b2c3d4").write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_atomically", full)
        with pytest.raises(TrainingError, match="No space left on device.*before it are intact"):
            train(config(), tmp_path)
    watch = _Messages()
    train(config(), tmp_path, resume=True, observer=watch)
    assert watch.start == 6 and not watch.messages
    assert outcome(tmp_path) == uninterrupted and not list(tmp_path.glob(".tmp-*"))


def test_only_the_last_two_checkpoints_stay(tmp_path):
    train(dataclasses.replace(config(), checkpoint_every=1), tmp_path)
    steps = sorted(path.stem[-2:] for path in tmp_path.glob("checkpoint-*.pt"))
    assert steps == ["11", "12"] == sorted(path.stem[-2:] for path in tmp_path.glob("checkpoint-*.json"))
