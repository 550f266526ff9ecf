"""Checks that robustkern._C and robustkern._aten compile against the headers of several versions of PyTorch.

The headers come out of PyTorch's wheels for macOS, a tenth as large as those for Linux and with the same headers; they
are kept in build/compat.  Prints a line for every version, and the compiler's errors for one that it refuses.

Usage: compat.py [VERSION ...]; by default all of VERSIONS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension

from described import ROOT, defines, extensions

VERSIONS = ("2.10.0", "2.12.1", "2.14.1", "2.15.0")  # docs/install.md names them
CACHE = ROOT / "build" / "compat"
PRECOMPILED = ROOT / "csrc" / "aten" / "precompiled.h"  # read once for all files of _aten


def headers(version: str) -> Path:
    """The folder of the headers of this version, downloaded if necessary."""
    folder = CACHE / version
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            platforms = ("--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64")
            choice = ("--no-deps", "--only-binary=:all:", *platforms, "--python-version=3.11", f"torch=={version}")
            # A constraint on what this machine installs must not constrain these headers.
            environment = os.environ | {"PIP_CONSTRAINT": os.devnull}
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "-d", scratch, *choice]
            subprocess.run(pip, check=True, env=environment)
            wheel = next(Path(scratch).glob("torch-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(Path(scratch) / "torch", names)
            (Path(scratch) / "torch").rename(folder)
    return folder / "torch" / "include"


def flags(extension: Extension, include: Path) -> list[str]:
    """The extension's own flags, with these headers in place of the installed PyTorch's."""
    import torch

    own = [folder for folder in extension.include_dirs if not folder.startswith(os.path.dirname(torch.__file__))]
    folders = [*own, str(include), str(include / "torch/csrc/api/include"), sysconfig.get_path("include")]
    kept = [flag for flag in extension.extra_compile_args["cxx"] if not flag.startswith(("-O", "-g", "-isystem"))]
    return [*kept, *defines(extension), *(flag for folder in folders for flag in ("-isystem", folder))]


def precompile(compiler: str, extension: Extension, include: Path, further: Sequence[str] = ()) -> list[str]:
    """Precompiles PyTorch's headers; returns the flags under which a file of the extension uses them."""
    header = shutil.copy(PRECOMPILED, include.parent)
    common = [*flags(extension, include), *further]
    command = [compiler, *common, "-x", "c++-header", header, "-o", f"{header}.gch"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return [*common, "-include", header]


def complaints(version: str) -> list[str]:
    """What the compiler says about each file that does not compile with this version."""
    compiler = os.environ.get("CXX", "g++")
    include = headers(version)
    commands = []
    for name, extension in EXTENSIONS.items():
        shared = precompile(compiler, extension, include) if name == "robustkern._aten" else flags(extension, include)
        commands += [[compiler, "-fsyntax-only", *shared, source] for source in extension.sources]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands))
    (include.parent / f"{PRECOMPILED.name}.gch").unlink()  # half a gigabyte
    return [result.stderr for result in done if result.returncode]


def main() -> None:
    """Prints one line per version; exits with 1 if one does not compile."""
    failed = False
    for version in sys.argv[1:] or VERSIONS:
        start = time.perf_counter()
        wrong = complaints(version)
        sources = sum(len(extension.sources) for extension in EXTENSIONS.values())
        outcome = f"{len(wrong)} of {sources} files do not compile" if wrong else f"all {sources} files compile"
        print(
            f"compat: PyTorch {version}: {outcome}; {time.perf_counter() - start:.0f} s", *wrong, sep="\n", flush=True
        )
        failed |= bool(wrong)
    sys.exit(failed)


EXTENSIONS = extensions()
if __name__ == "__main__":
    main()
