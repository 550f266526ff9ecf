"""Builds robustkern's extension with its CUDA kernels emulated, so that they serve CPU tensors.

    python tests/cuda_emulator/build.py                              # prints the path of the extension
    ROBUSTKERN_EMULATED=$(python tests/cuda_emulator/build.py) pytest tests

    python tests/cuda_emulator/build.py --sanitize address
    env $(python tests/cuda_emulator/build.py --sanitize address --print-env) pytest tests

The result is two files: the extension module ``_C``, and beside it ``libcuda_kernels.so``, which it loads. The kernels
have a library of their own because the emulator overwrites its library's thread-local storage before every block.
Exits with code 77, the mark of a skipped test, where g++ or the CUDA toolkit's headers are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

import toolchain
from toolchain import CSRC, ROOT

KERNELS = "libcuda_kernels.so"
MISSING = 77
# The oldest PyTorch whose stable ABI the extension uses, as in setup.py.
TARGET_VERSION = "0x020a000000000000ull"


def version_in(path: Path) -> str:
    """The value that a Python file assigns to VERSION or __version__, without running the file."""
    found = re.search(r"^(?:VERSION|__version__)\b[^=\n]*= *['\"]([^'\"]+)['\"]", path.read_text(), re.MULTILINE)
    return found.group(1) if found else "unknown"


def torch_flags() -> tuple[list[str], list[str]]:
    """Flags to compile and to link against the installed PyTorch, which need not be imported for them."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise toolchain.Unavailable("the emulated extension needs PyTorch, which is not installed")
    torch = Path(spec.origin).parent
    includes = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    compile_flags = [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    compile_flags.append(f'-DRK_VERSION="{version_in(ROOT / "setup.py")}"')
    compile_flags.append(f'-DRK_TORCH_VERSION="{version_in(torch / "version.py")}"')
    for path in includes:
        compile_flags += ["-isystem", str(path)]
    libraries = ["-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    return compile_flags, [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-Wl,--as-needed", *libraries]


def build_extension(csrc: Path, out: Path, sanitize: str | None = None, jobs: int | None = None) -> Path:
    """Builds the emulated extension from the sources in ``csrc``.

    Args:
        csrc: Holds ``ops.cpp`` and ``bindings.cpp``, and the kernels in ``cuda/*.cu``.
        out: Where the two libraries go; objects lie in a folder of it and are reused.
        sanitize: ``"address"`` for AddressSanitizer and UBSan.
        jobs: How many compilers run at a time; by default one per core.

    Returns:
        The path of the extension module.
    """
    host_sources = [csrc / "ops.cpp", csrc / "bindings.cpp"]
    kernel_sources = sorted((csrc / "cuda").glob("*.cu"))
    for source in host_sources:
        if not source.is_file():
            raise toolchain.BuildError(f"{source} does not exist")
    if not kernel_sources:
        raise toolchain.BuildError(f"no kernels in {csrc / 'cuda'}")

    torch_compile, torch_link = torch_flags()
    flags = [*toolchain.compile_flags(sanitize), "-fPIC", "-fvisibility=hidden", *torch_compile]
    flags += [f"-I{csrc}", f"-I{csrc / 'cuda'}", "-DROBUSTKERN_EMULATED=1"]

    def compile_one(source: Path) -> Path:
        target = out / "objects" / (source.name + ".o")
        if toolchain.compile_object(source, target, flags):
            print(f"compiled {source.name}", file=sys.stderr)
        return target

    with toolchain.exclusive(out):
        objects = toolchain.in_parallel(compile_one, [*kernel_sources, *host_sources], jobs)
        kernels, host = objects[: len(kernel_sources)], objects[len(kernel_sources) :]
        instrument = [flag for flag in toolchain.SANITIZERS[sanitize] if flag.startswith("-fsanitize=")]
        toolchain.link(kernels, out / KERNELS, ["-shared", *instrument, f"-Wl,-soname,{KERNELS}", *torch_link])
        extension = out / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        # --no-as-needed: nothing refers to a symbol of the kernels; loading them registers them.
        with_kernels = ["-Wl,--no-as-needed", f"-L{out}", f"-l:{KERNELS}", "-Wl,-rpath,$ORIGIN"]
        toolchain.link(host, extension, ["-shared", *instrument, *with_kernels, *torch_link])
    return extension


def environment(extension: Path, sanitize: str | None) -> dict[str, str]:
    """The environment in which Python runs with the emulated extension in place of robustkern's own."""
    variables = {"ROBUSTKERN_EMULATED": str(extension), **toolchain.sanitizer_environment(sanitize)}
    if sanitize is not None:
        variables["LD_PRELOAD"] = toolchain.preload(sanitize)
    return variables


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitize", choices=["address"], help="AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--csrc", type=Path, default=CSRC, help="the sources (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder for the result (default: build/emulated[-address])")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one per core)")
    parser.add_argument("--print-env", action="store_true", help="print NAME=VALUE lines, for env(1), not the path")
    options = parser.parse_args()

    name = "emulated" if options.sanitize is None else f"emulated-{options.sanitize}"
    out = (options.out or ROOT / "build" / name).resolve()
    try:
        extension = build_extension(options.csrc.resolve(), out, options.sanitize, options.jobs)
        if options.print_env:
            for variable, value in environment(extension, options.sanitize).items():
                print(f"{variable}={value}")
        else:
            print(extension)
    except toolchain.Unavailable as missing:
        print(missing, file=sys.stderr)
        return MISSING
    except toolchain.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
