"""One run in a directory, one process in a run."""

import multiprocessing
import os
import signal

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from robustkern.training import UsageError, recipe, train
from robustkern.training.files import RunLock


def test_two_processes_cannot_share_a_run(tmp_path):
    with RunLock(tmp_path), pytest.raises(UsageError, match=f"in use by another process .pid {os.getpid()}"):
        train(recipe("digits"), tmp_path)
    with RunLock(tmp_path):
        pass  # released


def test_lock_of_a_dead_process_does_not_hold(tmp_path):
    def die():
        RunLock(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with RunLock(tmp_path):
        pass


def test_a_run_is_not_overwritten(tmp_path):
    config = recipe("digits", epochs=1, train_samples=32, eval_samples=5, pgd_steps=1, threads=1)
    train(config, tmp_path)
    with pytest.raises(UsageError, match="already holds a run: pass --resume"):
        train(config, tmp_path)
