"""Finds g++ and the CUDA toolkit's headers, and compiles what has changed.

Only the headers are needed, no driver and no nvcc: from an installed toolkit, or from the PyPI packages
``nvidia-cuda-runtime``, ``nvidia-cuda-crt`` and ``nvidia-cuda-cccl``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parent.parent
CSRC = ROOT / "csrc"

SANITIZERS: dict[str | None, list[str]] = {
    None: ["-O2", "-g1"],
    # With UBSan's checks that concern kernels; all of them would take half as long again to compile.
    "address": [
        *["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"],
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    ],
    "thread": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}

# A kernel loads 16 bytes at once if the address allows it, else one element after another. g++ 12 merges both branches
# into one load, which assumes the alignment that only the first branch has. nvcc does not.
CORRECTNESS = ["-fno-if-conversion", "-fno-if-conversion2"]

Input = TypeVar("Input")
Output = TypeVar("Output")


class Unavailable(Exception):
    """The machine lacks what the emulator needs; the message says what."""


class BuildError(Exception):
    """The compiler failed; the message is its output."""


def compiler() -> str:
    """The C++ compiler, from $CXX or g++ on the PATH."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        raise Unavailable(f"the CUDA emulator needs a C++ compiler, and {command} is not on the PATH")
    return command


def _header_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent / "include"
    yield Path("/usr/local/cuda/include")
    yield from sorted(Path("/usr/local").glob("cuda-*/include"), reverse=True)
    yield Path("/usr/include")
    yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"), reverse=True)


def cuda_include_directories() -> list[Path]:
    """Where the CUDA toolkit's headers lie, those of libcu++ included."""
    for include in _header_candidates():
        if (include / "cuda_fp16.h").is_file() and (include / "vector_types.h").is_file():
            return [path for path in (include, include / "cccl") if path.is_dir()]
    raise Unavailable(
        "the CUDA emulator needs the headers of the CUDA toolkit (vector_types.h, cuda_fp16.h): set CUDA_HOME, "
        "or pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def compile_flags(sanitize: str | None, *, optimization: str | None = None) -> list[str]:
    """The flags for C++ that includes ``launch.cuh``; ``optimization`` replaces the build's own -O level."""
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *SANITIZERS[sanitize], *CORRECTNESS]
    if optimization is not None:
        flags.append(optimization)
    flags.append(f"-fmacro-prefix-map={ROOT}/=")  # messages name csrc/cuda/row_norm.cu, wherever the checkout lies
    flags += [f"-I{path}" for path in (CSRC, CSRC / "cuda", EMULATOR)]
    for path in cuda_include_directories():
        flags += ["-isystem", str(path)]
    return flags


def in_parallel(function: Callable[[Input], Output], inputs: Sequence[Input], jobs: int | None = None) -> list[Output]:
    """The results of ``function`` on all ``inputs``, in order, ``jobs`` at a time (default: one per core)."""
    with concurrent.futures.ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, inputs))


def run_compiler(command: Sequence[str]) -> None:
    """Runs a compiler or linker, and passes its warnings on."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr.strip():
        print(result.stderr.rstrip(), file=sys.stderr)


def _fingerprint(paths: Sequence[str]) -> dict[str, list[int]] | None:
    """Size and modification time of every file, or None if one is gone."""
    stats: dict[str, list[int]] = {}
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return None
        stats[path] = [status.st_size, status.st_mtime_ns]
    return stats


def _dependencies(depfile: Path) -> list[str]:
    """The prerequisites in a file that ``g++ -MD`` wrote."""
    text = depfile.read_text().replace("\\\n", " ")
    return shlex.split(text.split(":", 1)[1])


def up_to_date(target: Path, command: Sequence[str]) -> bool:
    """Whether ``target`` came from this very command, and no file that it was made from has changed since."""
    record = target.with_name(target.name + ".json")
    try:
        made = json.loads(record.read_text())
        return (
            target.is_file()
            and made["command"] == list(command)
            and made["inputs"] == _fingerprint(list(made["inputs"]))
        )
    except (OSError, ValueError, KeyError):
        return False


def record_build(target: Path, command: Sequence[str], inputs: Sequence[str]) -> None:
    """Records for :func:`up_to_date` how ``target`` was made."""
    record = {"command": list(command), "inputs": _fingerprint(inputs)}
    target.with_name(target.name + ".json").write_text(json.dumps(record))


def compile_object(source: Path, target: Path, flags: Sequence[str]) -> bool:
    """Compiles ``source``, a .cpp or .cu file, to ``target`` unless that is up to date; returns whether it did."""
    command = [compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
    if up_to_date(target, command):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    depfile = target.with_name(target.name + ".d")
    run_compiler([*command, "-MD", "-MF", str(depfile)])
    record_build(target, command, _dependencies(depfile))
    return True


def link(objects: Sequence[Path], target: Path, flags: Sequence[str]) -> bool:
    """Links ``objects`` to ``target`` unless that is up to date; returns whether it did."""
    command = [compiler(), *map(str, objects), "-o", str(target), *flags]
    if up_to_date(target, command):
        return False
    run_compiler(command)
    record_build(target, command, [str(path) for path in objects])
    return True


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keeps two processes from building in one directory at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sanitizer_environment(sanitize: str | None) -> dict[str, str]:
    """What a process that loads sanitized code must find in its environment, besides the runtime itself."""
    if sanitize == "address":
        return {
            # Python and PyTorch keep much memory until exit. Fibers leave no room for a fake stack per frame.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    if sanitize == "thread":
        return {"TSAN_OPTIONS": "halt_on_error=1:report_bugs=1"}
    return {}


def preload(sanitize: str | None) -> str:
    """The libraries that an uninstrumented program, such as Python, must load first; empty if none.

    libstdc++ is among them because the runtime looks for its exception functions once, at the start.
    """
    if sanitize is None:
        return ""
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitize]
    paths = []
    for library in (runtime, "libstdc++.so.6"):
        command = [compiler(), f"-print-file-name={library}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            raise Unavailable(f"{compiler()} comes without {library}")
        paths.append(str(path.resolve()))
    return ":".join(paths)
