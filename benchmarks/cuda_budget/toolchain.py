"""From csrc/cuda/*.cu to machine code in words: nvcc with the package's own flags for sm_90, then nvdisasm.

What was compiled lies in build/cuda-budget under a hash of the source, the headers that it includes, and the flags.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "cuda-budget"
ARCHITECTURE = "90"
JOBS = 2


class Unavailable(Exception):
    """This machine lacks a tool; the message says which, and where to get it."""


def find_nvdisasm() -> Path:
    """The disassembler: of the toolkit, on the PATH, or of the PyPI package nvidia-cuda-nvdisasm."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*homes, Path("/usr/local/cuda/bin")]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"), reverse=True)
    on_path = shutil.which("nvdisasm")
    for candidate in (os.environ.get("NVDISASM"), on_path, *(folder / "nvdisasm" for folder in folders)):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    raise Unavailable("no nvdisasm: it comes with the CUDA toolkit, and as: pip install nvidia-cuda-nvdisasm")


@functools.cache
def nvcc_command() -> list[str]:
    """nvcc and the package's own flags, for one architecture."""
    sys.path.insert(0, str(ROOT / "tests"))
    here = os.getcwd()
    try:
        from cuda_compile import find_nvcc, keep_architectures

        from described import defines, extensions

        with contextlib.redirect_stderr(io.StringIO()):  # setup.py's news
            extension: Extension = extensions(cuda=True)["robustkern._cuda"]
    except SystemExit as missing:
        raise Unavailable(str(missing)) from None
    finally:
        os.chdir(here)
        sys.path.remove(str(ROOT / "tests"))
    keep_architectures(extension, [ARCHITECTURE])
    includes = [flag for folder in extension.include_dirs for flag in ("-isystem", folder)]
    includes += ["-isystem", sysconfig.get_paths()["include"]]
    flags = extension.extra_compile_args["nvcc"]
    return [*find_nvcc(extension), *flags, "-Xptxas=-v", *defines(extension), *includes]


def included(source: Path) -> list[Path]:
    """The source and, of what it includes, the files in csrc."""
    found: dict[Path, None] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found or not path.is_file():
            continue
        found[path] = None
        pending += [(path.parent / name).resolve() for name in re.findall(r'#include "([^"]+)"', path.read_text())]
    return list(found)


def fingerprint(source: Path, flags: list[str]) -> str:
    digest = hashlib.sha256("\0".join(flags).encode())
    for path in sorted(included(source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout, done.stderr


def disassemble(source: Path, command: list[str], nvdisasm: Path) -> tuple[str, str]:
    """The machine code of one .cu file in words, with encodings, and ptxas's report."""
    stem = OUT / f"{source.stem}-{fingerprint(source, command)}"
    words, report, cubin = (stem.with_suffix(suffix) for suffix in (".sass", ".ptxas", ".cubin"))
    if not (words.is_file() and report.is_file()):
        OUT.mkdir(parents=True, exist_ok=True)
        for stale in OUT.glob(f"{source.stem}-" + "?" * 16 + ".*"):
            stale.unlink()
        _, said = run([*command, "-cubin", str(source), "-o", str(cubin)])
        report.write_text(said)
        text, _ = run([str(nvdisasm), "-c", "-hex", str(cubin)])
        words.write_text(text)
        cubin.unlink()
    return words.read_text(), report.read_text()


def disassembled(stems: list[str]) -> dict[str, tuple[str, str]]:
    """The same of csrc/cuda/<stem>.cu, several at a time."""
    command, nvdisasm = nvcc_command(), find_nvdisasm()

    def one(stem: str) -> tuple[str, str]:
        return disassemble(CSRC / "cuda" / f"{stem}.cu", command, nvdisasm)

    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip(stems, pool.map(one, stems)))
