"""Tasks shared among processes: order, errors, signals."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from robustkern.study.parallel import in_parallel
from robustkern.training import TrainingError, UsageError
from robustkern.training.files import RunLock


def write(number: int, folder: Path) -> None:
    (folder / f"{number}-{os.getpid()}").touch()


def fail(number: int) -> None:
    if number == 1:
        raise ValueError("task 1 does not like this")


def vanish(number: int) -> None:
    os._exit(3)


def wait_long(number: int, folder: Path) -> None:
    run = folder / f"run-{number}"
    run.mkdir(exist_ok=True)
    with RunLock(run):
        (folder / "begun").touch()
        time.sleep(600)


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_once_and_none_before_it_is_ready(jobs, tmp_path):
    started, ended = [], []
    ready = lambda task, done: task != 0 or {1, 2} <= done  # noqa: E731 - the first waits for the others
    in_parallel(
        range(4), partial(write, folder=tmp_path), jobs, ready=ready, on_start=started.append, on_done=ended.append
    )
    names = [path.name.split("-") for path in tmp_path.iterdir()]
    assert sorted(number for number, _ in names) == list("0123") == sorted(map(str, ended))
    assert {1, 2} <= set(started[: started.index(0)])
    own = {process for _, process in names} == {str(os.getpid())}
    assert own == (jobs == 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_task_is_raised_here(jobs):
    with pytest.raises(ValueError, match="task 1 does not like this"):
        in_parallel(range(3), fail, jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_that_wait_for_each_other_are_refused(jobs):
    with pytest.raises(TrainingError, match="no task can begin: each waits for another"):
        in_parallel(range(2), fail, jobs, ready=lambda task, done: False)


def test_a_process_that_vanishes_is_an_error():
    with pytest.raises(TrainingError, match=r"ended without a word \(exit code 3\)"):
        in_parallel(range(2), vanish, 2)


def begin_to_wait(folder: Path) -> subprocess.Popen[str]:
    """Another Python that shares `wait_long` among two processes, once the first of these is at work."""
    program = (
        "from functools import partial; from pathlib import Path; import test_parallel as t\n"
        "if __name__ == '__main__':\n"
        f"    t.in_parallel(range(3), partial(t.wait_long, folder=Path({str(folder)!r})), 2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_processes(number, tmp_path):
    process = begin_to_wait(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and f"stopped by {number.name}" in errors
    left = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    assert not left.stdout


def test_processes_of_a_killed_one_end_and_free_what_they_held(tmp_path):
    process = begin_to_wait(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    for run in tmp_path.glob("run-*"):
        while True:
            try:
                with RunLock(run):
                    break
            except UsageError:
                assert time.monotonic() < deadline, f"{run} is still in use"
                time.sleep(0.05)
