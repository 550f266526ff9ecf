"""Groups of forked processes: they need no import of PyTorch, and their answers go to files."""

import multiprocessing
import os
import socket

import torch


def fork(out, function, *args, size=2):
    """Starts `function(rank, *args)` in a group of processes; their answers go to files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank):
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        try:
            answer = function(rank, *args)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        (out / f"answer-{rank}").write_text(str(answer))

    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def answers(out, processes, seconds=240):
    for process in processes:
        process.join(seconds)
        assert not process.is_alive(), "a process still waits"
    return [path.read_text() for path in sorted(out.glob("answer-*"))]
