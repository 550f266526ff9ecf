"""Tasks shared among processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

from robustkern.training import Interrupted, TrainingError
from robustkern.training.signals import StopOnSignal

Task = TypeVar("Task")


def in_parallel(
    tasks: Sequence[Task],
    work: Callable[[Task], None],
    jobs: int,
    *,
    ready: Callable[[Task, set[int]], bool] = lambda task, done: True,
    on_start: Callable[[int], None] = lambda number: None,
    on_done: Callable[[int], None] = lambda number: None,
) -> None:
    """Do every task, `jobs` at a time, in their order as far as `ready` allows.

    With one job, tasks run in this process; with more, in processes of their own, which end when this one does.

    Args:
        tasks: What to do; picklable if there is more than one job.
        work: Does one task; a function of a module, or a partial of one.
        jobs: Processes.
        ready: Whether a task can begin, given the numbers of those that are done.
        on_start: Told the number of each task before it begins.
        on_done: Told the number of each task when it is done.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the processes were told to stop, which a training does after its step.
        TrainingError: A process ended without a message, or no task can begin.
        Exception: What a task raised; the others are stopped.
    """
    running: set[int] = set()
    done: set[int] = set()

    def begin() -> int | None:
        """The number of a task that begins now; None if there is none, or each waits for one that is running."""
        left = [number for number in range(len(tasks)) if number not in running | done]
        number = next((number for number in left if ready(tasks[number], done)), None)
        if number is not None:
            on_start(number)
            running.add(number)
        elif left and not running:
            raise TrainingError("no task can begin: each waits for another")
        return number

    def end(number: int) -> None:
        running.remove(number)
        done.add(number)
        on_done(number)

    if jobs == 1:
        while (number := begin()) is not None:
            work(tasks[number])
            end(number)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of PyTorch's threads
    processes: dict[Connection, SpawnProcess] = {}
    given: dict[Connection, int] = {}
    with StopOnSignal() as stop:
        try:
            for _ in range(min(jobs, len(tasks))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()  # so that it ends when the worker does
                processes[ours] = process
            while len(done) < len(tasks):
                for connection in processes:
                    if connection not in given and (number := begin()) is not None:
                        connection.send(tasks[number])
                        given[connection] = number
                for ended in wait(list(given), timeout=0.5):
                    assert isinstance(ended, Connection)
                    number = given.pop(ended)
                    try:
                        error = ended.recv()
                    except EOFError:
                        processes[ended].join()
                        if stop.signal is not None:
                            break
                        raise TrainingError(
                            f"a process ended without a word (exit code {processes[ended].exitcode}); the same command "
                            "goes on from where it was"
                        ) from None
                    if error is None:
                        end(number)
                    elif stop.signal is None:  # otherwise the error only says that it was stopped
                        raise error
                if stop.signal is not None:
                    name = signal.Signals(stop.signal).name
                    raise Interrupted(f"stopped by {name}", "the same command goes on from there")
        finally:
            for connection, process in processes.items():
                connection.close()
                if len(done) < len(tasks):
                    process.terminate()  # a training saves its state first
            for process in processes.values():
                process.join()


def _end_with_parent() -> None:
    """Ends this process when its parent ends: a killed parent tells nobody, and workers must not keep locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _serve(connection: Connection, work: Callable[[Task], None]) -> None:
    """The loop of a worker: tasks come in, None or an exception goes out, until the other end is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            task = connection.recv()
            try:
                work(task)
            except Exception as error:
                connection.send(error)
            else:
                connection.send(None)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
