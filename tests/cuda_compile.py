"""Compiles the CUDA extension with nvcc, on any machine: no GPU and no CUDA build of PyTorch needed.

Prints registers, shared memory and spills of every kernel for every architecture; fails if a kernel spills
registers, if the library does not link, or if it does not load into the PyTorch at hand and register its
kernels.  Without nvcc it says so and succeeds.

Usage: cuda_compile.py [ARCHITECTURE ...], such as 90; by default all that a release is built for, and PTX.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension

from described import ROOT, defines, extensions, run

OUT = ROOT / "build" / "cuda"


def keep_architectures(extension: Extension, chosen: list[str]) -> None:
    """Compile for these architectures alone."""
    flags = extension.extra_compile_args["nvcc"]
    known = [flag.split("code=sm_")[1] for flag in flags if "code=sm_" in flag]
    if unknown := sorted(set(chosen) - set(known)):
        sys.exit(f"cuda_compile.py: no architecture {unknown[0]}: choose among {' '.join(known)}")
    if chosen:
        extension.extra_compile_args["nvcc"] = [
            flag for flag in flags if "-gencode" not in flag or flag.split("code=sm_")[-1] in chosen
        ]


def find_nvcc(extension: Extension) -> list[str]:
    """nvcc of the toolkit that setup.py found, with what PyTorch adds to a build: 16 bits are not converted unasked."""
    from torch.utils import cpp_extension

    return [os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"), *cpp_extension.COMMON_NVCC_FLAGS]


def compile_source(source: str, extension: Extension, nvcc: list[str]) -> tuple[Path, str]:
    """Compiles one file; returns the object and ptxas's report."""
    target = OUT / (Path(source).name + ".o")
    includes = [flag for folder in extension.include_dirs for flag in ("-isystem", folder)]
    includes += ["-isystem", sysconfig.get_paths()["include"]]
    if source.endswith(".cu"):
        flags = [*extension.extra_compile_args["nvcc"], "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall"]
        return target, run([*nvcc, "-c", source, "-o", str(target), *flags, *defines(extension), *includes])
    flags = ["-fPIC", *extension.extra_compile_args["cxx"], *defines(extension), *includes]
    return target, run([os.environ.get("CXX", "c++"), "-c", source, "-o", str(target), *flags])


def demangle(names: list[str]) -> list[str]:
    """Readable names of kernels, without their argument lists."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    lines = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        re.sub(r"\(rk::cuda::\w+Call<.*", "", line).replace("void ", "").replace("rk::cuda::", "").replace("rk::", "")
        for line in lines
    ]


def parse(report: str) -> dict[str, dict[str, tuple[int, int, int]]]:
    """{kernel: {architecture: (registers, shared bytes, spilled bytes)}} from ptxas -v."""
    kernels: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)(?:\n|$)",
        re.S,
    )
    for name, arch, stores, loads, registers, rest in pattern.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[name][arch] = (int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
    return kernels


def main() -> None:
    """Compile, report, link, load."""
    try:
        extension = extensions(cuda=True)["robustkern._cuda"]
    except SystemExit as missing:
        print(f"cuda-compile: skipped: {missing}")
        return
    keep_architectures(extension, sys.argv[1:])
    start = time.perf_counter()
    nvcc = find_nvcc(extension)
    OUT.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda s: compile_source(s, extension, nvcc), sorted(extension.sources, reverse=True)))
    kernels = parse("\n".join(report for _, report in compiled))
    architectures = sorted({arch for figures in kernels.values() for arch in figures}, key=lambda a: int(a[3:]))
    print(f"{'registers / shared bytes / spilled bytes':<96}" + "".join(f"{arch:>16}" for arch in architectures))
    spilled = []
    for readable, name in sorted(zip(demangle(list(kernels)), kernels)):
        print(
            f"{readable:<96}"
            + "".join("{:>16}".format("{} / {} / {}".format(*kernels[name][a])) for a in architectures)
        )
        spilled += [f"{readable} on {a}" for a in architectures if kernels[name][a][2]]
    library = OUT / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    folders = [flag for folder in extension.library_dirs for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    run(
        [
            os.environ.get("CXX", "c++"),
            "-shared",
            *(str(o) for o, _ in compiled),
            "-o",
            str(library),
            *folders,
            *(f"-l{name}" for name in extension.libraries),
        ]
    )
    warnings = [
        line for _, report in compiled for line in report.splitlines() if "warning" in line and "spilled" not in line
    ]
    if warnings:
        sys.exit("cuda-compile: the compiler warns\n  " + "\n  ".join(warnings))
    if spilled:
        sys.exit("cuda-compile: registers spilled in\n  " + "\n  ".join(spilled))

    import torch

    import robustkern

    reason = robustkern._library.why_unavailable()
    if reason:
        sys.exit(f"cuda-compile: {reason}")
    spec = importlib.util.spec_from_file_location("robustkern._cuda", library)
    assert spec is not None
    assert spec.loader is not None
    if robustkern._library.cuda_extension() is None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text())
    without = [s for s in schemas if not torch._C._dispatch_has_kernel_for_dispatch_key(f"robustkern::{s}", "CUDA")]
    if without:
        sys.exit(f"cuda-compile: no CUDA kernel registered for {', '.join(without)}")
    ptx = "" if sys.argv[1:] else " and PTX"
    print(
        f"cuda-compile: {len(kernels)} kernels for {', '.join(architectures)}{ptx}, none spills; {library.name} "
        f"({library.stat().st_size / 2**20:.1f} MiB) loads with PyTorch {torch.__version__}; "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
