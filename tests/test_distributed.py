"""Several processes: they give the results of one, and no process waits forever for one that is gone."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("yaml")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from processes import answers, fork

import distributed_runs
from distributed_runs import CASES, FLOAT32, SMOOTH, precision_of, small
from robustkern import data as datasets
from robustkern import models, training
from robustkern.data import DataError
from robustkern.training import CheckpointError, train
from robustkern.training import step as step_module
from robustkern.training import trainer as trainer_module
from robustkern.training.distributed import process_group
from robustkern.training.feed import Feed
from robustkern.training.run_folder import RunFolder
from robustkern.training.validation import split

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """What `distributed_runs.prepare` sets, put back afterwards."""
    monkeypatch.setattr(trainer_module, "build_loss", trainer_module.build_loss)
    monkeypatch.setattr(trainer_module, "check_options", trainer_module.check_options)
    monkeypatch.setattr(datasets, "augmentation", datasets.augmentation)
    monkeypatch.setattr(RunFolder, "draw", RunFolder.draw)
    distributed_runs.prepare()


def weights(path):
    return training.load_model(path)[0].state_dict()


def distance(config, one, other):
    """The distance between two runs' weights, relative to how far the first has moved from its initial ones."""
    data, _ = split(datasets.load(config.data).first(config.train_samples), config.validation, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        begin = models.create(config.model, data.num_classes, data.in_shape, *data.statistics()).state_dict()
    one, other, begin = (torch.cat([v.double().flatten() for v in state.values()]) for state in (one, other, begin))
    return float((one - other).norm() / (one - begin).norm())


# Rounding errors, magnified by a few steps. In float64 they come from images and their gradients, which are float32. In
# float32, an attack may move a pixel whose gradient is nearly zero either way.
ROUNDING, ROUNDING_64, SIGNS = 1e-4, 1e-6, 0.02


# --- the results of one process ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, distributed_runs.__file__, str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(tmp_path, two_processes, case):
    limit = ROUNDING if case in SMOOTH else SIGNS if case in FLOAT32 else ROUNDING_64
    with precision_of(case):
        alone = train(CASES[case], tmp_path)
        for file in sorted(tmp_path.glob("*.safetensors")):
            assert distance(CASES[case], weights(file), weights(two_processes / case / file.name)) < limit, file.name
    rows = [json.loads(line) for line in (two_processes / case / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(alone.rows)
    for mine, theirs in zip(alone.rows, rows, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"ms_per_step"}:
            # An accuracy may change by an image on the decision boundary.
            tolerance = {"abs": 0.04} if name.endswith("accuracy") else {"rel": limit, "abs": 1e-7}
            assert mine[name] == pytest.approx(theirs[name], **tolerance), name


@pytest.mark.parametrize("case, limit", [("standard", 10 * ROUNDING), ("fisher", 10 * ROUNDING), ("pgd", 1.5 * SIGNS)])
def test_the_comparison_would_notice(tmp_path, monkeypatch, case, limit):
    """With one row less in a batch, or other random numbers."""
    whole = train(CASES[case], tmp_path / "whole").model.state_dict()
    with monkeypatch.context() as patch:
        batch = Feed.batch
        patch.setattr(Feed, "batch", lambda self, *given: [t[: max(1, len(t) - 1)] for t in batch(self, *given)])
        fewer = train(CASES[case], tmp_path / "fewer").model.state_dict()
    assert distance(CASES[case], whole, fewer) > limit
    if case != "standard":
        draws = step_module._generator
        monkeypatch.setattr(step_module, "_generator", lambda seed, step, device: draws(seed, step + 1, device))
        others = train(CASES[case], tmp_path / "others").model.state_dict()
        assert distance(CASES[case], whole, others) > limit


# --- processes of our own ---------------------------------------------------------------------------------------------


def wait_for_an_epoch(out, processes):
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert all(process.is_alive() for process in processes), answers(out, processes)
        time.sleep(0.01)


class _At(training.Observer):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, progress):
        if progress.step == self.step:
            self.act()


def crash():
    raise KeyboardInterrupt  # not an Exception: nothing may handle it


def test_a_run_is_resumed_by_another_number_of_processes(tmp_path):
    settings = small("jacobian", ema=0.5, validation=7, checkpoint_every=1, epochs=3)
    whole = train(settings, tmp_path / "whole")

    def start(rank, out, observer=None, shard=False):
        train(settings, out, resume=True, observer=observer, shard=shard)

    # Two processes, killed after step 2; two by FSDP2, after step 3; then one, after step 4; then three by FSDP2.
    out = tmp_path / "run"
    first = fork(out, start, out, _At(2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert "lost the others" in answers(out, first)[0]
    answers(out, fork(out, start, out, _At(3, crash), True))
    with pytest.raises(KeyboardInterrupt):
        train(settings, out, resume=True, observer=_At(4, crash))
    (out / "answer-1").unlink()
    assert answers(out, fork(out, start, out, None, True, size=3)) == ["None"] * 3
    for name in ("model", "ema", "best"):
        one, other = weights(tmp_path / "whole" / f"{name}.safetensors"), weights(out / f"{name}.safetensors")
        assert distance(settings, one, other) < ROUNDING
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in whole.rows]


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_resume_to_the_same_bits(tmp_path, shard):
    settings = small("fisher", checkpoint_every=2, ema=0.5)

    def start(rank, out, observer=None):
        train(settings, out, resume=True, observer=observer, shard=shard)

    assert answers(tmp_path / "a", fork(tmp_path / "a", start, tmp_path / "a")) == ["None"] * 2
    out = tmp_path / "b"
    answers(out, fork(out, start, out, _At(3, crash)))
    assert answers(out, fork(out, start, out)) == ["None"] * 2
    for name in ("model", "ema"):
        assert (tmp_path / "a" / f"{name}.safetensors").read_bytes() == (out / f"{name}.safetensors").read_bytes()


def test_a_signal_to_any_process_stops_all_and_saves(tmp_path):
    settings = small(epochs=50)

    def start(rank):
        train(settings, tmp_path)

    processes = fork(tmp_path, start)
    wait_for_an_epoch(tmp_path, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    zero, one = answers(tmp_path, processes)
    assert zero.startswith("Interrupted: stopped by a signal to another process after step")
    assert one.startswith("Interrupted: stopped by SIGTERM after step")
    step = int(re.search(r"after step (\d+)", zero)[1])
    assert f"after step {step};" in one and (tmp_path / f"checkpoint-{step:09d}.json").exists()


def test_a_process_that_is_stuck_is_given_up(tmp_path):
    settings = small(epochs=200)

    def start(rank):
        train(settings, tmp_path, timeout=10.0)

    processes = fork(tmp_path, start)
    wait_for_an_epoch(tmp_path, processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(120)
    assert not processes[0].is_alive()
    processes[1].kill()
    message = (tmp_path / "answer-0").read_text()
    assert "TrainingError: process 0 of 2 lost the others" in message and "no answer for 10 s" in message
    assert "\n" not in message


def test_an_error_of_one_process_is_the_error_of_all(tmp_path):
    load = datasets.load

    def missing(rank):
        datasets.load = lambda *a: load(*a) if rank == 0 else (_ for _ in ()).throw(DataError("no files here"))
        train(small(), tmp_path / "run")

    assert answers(tmp_path, fork(tmp_path, missing)) == ["DataError: no files here"] * 2
    assert not (tmp_path / "run").exists()
    train(small(epochs=1), tmp_path / "run")
    refused = answers(tmp_path, fork(tmp_path, lambda rank: train(small(epochs=1), tmp_path / "run")))
    assert len(set(refused)) == 1 and "already holds a run: pass --resume" in refused[0]


@pytest.mark.parametrize("lacking", ["teacher", "folder"])
def test_what_one_machine_lacks_is_the_error_of_all(tmp_path, lacking):
    def start(rank):
        def build(*args, **kwargs):
            raise CheckpointError("no such file")

        if rank == 1 and lacking == "teacher":
            trainer_module.build_loss = build
        if rank == 1 and lacking == "folder":
            trainer_module.Path = type("Nowhere", (), {"__new__": lambda *args: Path(os.devnull)})
        data = str(tmp_path) if lacking == "folder" else "digits"
        train(dataclasses.replace(small(), data=data), tmp_path / "run", timeout=60.0)

    started = time.monotonic()
    error, other = answers(tmp_path, fork(tmp_path, start))
    assert error == other and ("no such file" if lacking == "teacher" else "no data set") in error
    assert time.monotonic() - started < 50  # nobody waited
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("late", ["comes", "asks"])
def test_a_process_without_a_gpu_is_the_error_of_all(tmp_path, late):
    def start(rank):
        torch.cuda.device_count = lambda: 1
        if rank == 1 and late == "comes":
            time.sleep(0.5)  # the others are there first, and wait
        if rank == 1 and late == "asks":
            get = torch.distributed.TCPStore.get
            torch.distributed.TCPStore.get = lambda *args: (time.sleep(0.5), get(*args))[1]  # the others know first
        train(small(device="cuda"), tmp_path / "run", timeout=60.0)

    refused = answers(tmp_path, fork(tmp_path, start))
    assert refused == ["UsageError: process 1 has no GPU: it is number 1 of its machine, which has 1"] * 2


def test_processes_with_gpus_meet(tmp_path):
    """Uses gloo in place of NCCL."""

    def start(rank):
        torch.cuda.device_count, torch.cuda.set_device = lambda: 2, lambda local: None
        begin = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda backend, **given: begin("gloo", **given)
        with process_group("cuda", 60.0) as group:
            return group.on_all(
                lambda: (group.device, torch.distributed.get_rank(), torch.distributed.get_world_size())
            )

    assert answers(tmp_path, fork(tmp_path, start)) == ["('cuda', 0, 2)", "('cuda', 1, 2)"]


def test_processes_must_agree_on_their_settings(tmp_path):
    refused = answers(tmp_path, fork(tmp_path, lambda rank: train(small(seed=rank), tmp_path / "run")))
    assert refused == ["UsageError: process 1 was started with other settings than process 0: seed 0 -> 1"] * 2
    assert not (tmp_path / "run").exists()


def test_what_is_not_finite_for_one_is_skipped_by_all(tmp_path):
    build = trainer_module.build_loss

    def start(rank):
        calls = []

        def poisoned(*args, **kwargs):
            loss = build(*args, **kwargs)

            def call(model, x, y, draw):
                calls.append(len(x))
                terms = loss(model, x, y, draw)
                bad = rank == 1 and len(calls) == 2
                return terms._replace(orientation=terms.orientation * float("nan")) if bad else terms

            return call

        trainer_module.build_loss = poisoned
        result = train(small(), tmp_path / "run")
        flat = torch.cat([value.double().flatten() for value in result.model.state_dict().values()])
        return int(result.rows[0]["skipped"]), bool(flat.isfinite().all()), flat.sum().item()

    zero, one = answers(tmp_path, fork(tmp_path, start))
    assert zero == one and zero.startswith("(1, True, ")


def test_buffers_are_averaged_over_the_processes(tmp_path, monkeypatch):
    def network(classes, shape):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 16), torch.nn.ReLU(),
            torch.nn.Linear(16, classes),
        )  # fmt: skip

    monkeypatch.setitem(models.MODELS, "normalised", network)
    settings = small(model="normalised", epochs=1, train_samples=32, batch_size=32)
    alone = train(settings, tmp_path / "alone").model.network[1]

    def start(rank):
        norm = train(settings, tmp_path / "run").model.network[1]
        return norm.running_mean.tolist(), norm.running_var.tolist(), int(norm.num_batches_tracked)

    zero, one = answers(tmp_path, fork(tmp_path, start))
    assert zero == one
    mean, var, count = json.loads("[" + zero[1:-1] + "]")
    assert mean == pytest.approx(alone.running_mean.tolist(), rel=1e-5, abs=1e-6)
    # The variance within the parts lacks the variance between their means, and has another divisor.
    assert var == pytest.approx(alone.running_var.tolist(), rel=0.1, abs=0.02)
    assert count == 1 and not torch.allclose(torch.tensor(var), alone.running_var)


def test_alone_there_is_nothing_to_divide(tmp_path):
    with pytest.raises(training.UsageError, match="shard takes several processes: torchrun"):
        train(small(), tmp_path / "run", shard=True)


def test_an_environment_that_is_no_torchruns_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(training.UsageError, match="WORLD_SIZE is 2, but RANK, .* start the processes with torchrun"):
        train(small(), tmp_path / "run")


# --- torchrun ---------------------------------------------------------------------------------------------------------


def test_torchrun_trains_through_the_command_line(tmp_path):
    arguments = ["--method", "gradient-penalty", "--epochs", "1", "--train-samples", "67", "--batch-size", "33",
                 "--eval-samples", "20", "--pgd-steps", "2", "--threads", "1", "--shard",
                 "--out", tmp_path / "run"]  # fmt: skip
    command = [*TORCHRUN, "-m", "robustkern", "train", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("orientation") == 1 and result.stdout.count("done") == 1
    assert (tmp_path / "run" / "curves.png").exists()
    assert training.load_model(tmp_path / "run")[1]["epoch"] == 1
