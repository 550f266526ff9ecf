"""Builds the null GPU for the PyTorch at hand and prints the environment that puts it in place.

env $(python tests/null_gpu/build.py) python program.py
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "null_gpu.cpp"
LIBRARIES = ("libtorch_cuda", "libc10_cuda", "libtorch_cuda_linalg", "libtorch_python")
# nvrtc and these of cuDNN work without a GPU.
REAL = re.compile(r"nvrtc|cudnnGet(Version|CudartVersion|ErrorString|LastErrorString|Property)|cublasLtGetVersion")
CREATES = re.compile(r"^(cublas|cudnn|cusparse|cusolver|cufft).*Create(?!Plan)")
COMPUTES = re.compile(r"[Gg]em[mv]|Matmul$|BackendExecute|^cuLaunch|(Convolution|BatchNormalization)(For|Back)ward|RNN")


def symbols(library: Path, which: str) -> set[str]:
    """The names that a shared library defines, or leaves undefined, without their versions."""
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line}


def stub(name: str) -> str:
    if CREATES.match(name):
        return f"int {name}(void** made) {{ *made = null_gpu_token(); return 0; }}"
    note = f'null_gpu_note("{name}"); ' if COMPUTES.search(name) and not re.search("Get|Set", name) else ""
    return f"long {name}(void) {{ {note}return 0; }}"


def build() -> Path:
    """The library; made anew if PyTorch, this script or its source is newer."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    if torch.version.cuda is None:
        raise SystemExit(f"PyTorch {torch.__version__} was built without CUDA: there is nothing to stand in for")
    out = ROOT / "build" / "null_gpu" / torch.__version__
    library = out / "libnull_gpu.so"
    newest = max(p.stat().st_mtime for p in (Path(__file__), SOURCE, folder / "libtorch_cuda.so"))
    if library.exists() and library.stat().st_mtime > newest:
        return library
    out.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    written, stubs, ours = out / "null_gpu.o", out / "stubs.c", out / "ours.so"
    homes = (folder.parents[1] / "nvidia" / "cu13", os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    compile_ = [compiler, "-std=c++20", "-O2", "-fPIC", "-c", *(f"-I{home}/include" for home in homes)]
    subprocess.run([*compile_, str(SOURCE), "-o", str(written)], check=True)
    subprocess.run([compiler, "-shared", str(written), "-o", str(ours)], check=True)
    called = set().union(*(symbols(p, "--undefined-only") for n in LIBRARIES if (p := folder / f"{n}.so").exists()))
    missing = {name for name in called if re.match(r"(__)?cu(da|blas|dnn|sparse|solver|fft)[A-Z]", name)}
    missing = {name for name in missing if not REAL.search(name)}
    header = next(path for home in homes if (path := Path(home) / "include" / "cuda.h").exists())
    missing |= set(re.findall(r"\bcu[A-Z]\w+(?=\()|(?<=\s)cu[A-Z]\w+_v\d+\b", header.read_text()))  # the driver's
    missing -= symbols(ours, "--defined-only")
    lines = ["void null_gpu_note(const char*);", "void* null_gpu_token(void);", *map(stub, sorted(missing))]
    stubs.write_text("\n".join(lines) + "\n")
    link = [compiler, "-shared", "-fPIC", "-w", "-x", "c", str(stubs), "-x", "none", str(written), "-lstdc++"]
    subprocess.run([*link, "-o", str(library)], check=True)
    ours.unlink()
    driver = out / "libcuda.so.1"
    driver.unlink(missing_ok=True)
    driver.symlink_to(library.name)
    return library


def environment() -> dict[str, str]:
    """The variables that put it in place, built if need be."""
    library = build()
    searched = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": ":".join(searched)}


if __name__ == "__main__":
    print(" ".join(f"{name}={value}" for name, value in environment().items()))
