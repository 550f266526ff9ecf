"""Builds and runs the C++ tests of the CUDA kernels in the emulator: test_<op>.cpp for every csrc/cuda/<op>.cu.

    python tests/cuda_emulator/run_kernel_tests.py                     # four orders of execution, and huge grids
    python tests/cuda_emulator/run_kernel_tests.py --sanitize thread   # missing barriers, races between blocks
    python tests/cuda_emulator/run_kernel_tests.py --sanitize address  # out of bounds, misaligned, overflow

Exits with 0 if all pass, 1 if not, and 77, the mark of a skipped test, where g++ or the CUDA toolkit's headers are
missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import toolchain

MISSING = 77
# Under ThreadSanitizer a block takes 15 ms, and there is no room for the address space that a huge grid reserves.
ARGUMENTS: dict[str | None, list[str]] = {None: ["--huge"], "address": ["--huge"], "thread": ["--rounds", "3"]}


def operators() -> list[str]:
    """The operators with CUDA kernels."""
    return sorted(source.stem for source in (toolchain.CSRC / "cuda").glob("*.cu"))


def build_test(operator: str, sanitize: str | None, out: Path) -> Path:
    """Compiles the test program of one operator; returns its path."""
    source = toolchain.EMULATOR / f"test_{operator}.cpp"
    if not source.is_file():
        raise toolchain.BuildError(f"the kernels of {operator} have no test: {source.name} does not exist")
    flags = toolchain.compile_flags(sanitize, optimization="-O1")
    name = f"{operator}-{sanitize or 'plain'}"
    toolchain.compile_object(source, out / f"{name}.o", flags)
    instrument = [flag for flag in flags if flag.startswith("-fsanitize=")]
    toolchain.link([out / f"{name}.o"], out / name, instrument)
    return out / name


def run_test(program: Path, sanitize: str | None, arguments: Sequence[str]) -> tuple[bool, str]:
    """Runs a test program; returns whether it passed, and its output."""
    environment = {**os.environ, **toolchain.sanitizer_environment(sanitize)}
    result = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=False)
    return result.returncode == 0, (result.stdout + result.stderr).strip()


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", help="the operators to test (default: all that have CUDA kernels)")
    parser.add_argument(
        "--sanitize", choices=["address", "thread"], help="build with AddressSanitizer and UBSan, or TSan"
    )
    parser.add_argument("--rounds", type=int, help="random shapes to try")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random shapes (default: 1)")
    parser.add_argument("--out", type=Path, default=toolchain.ROOT / "build" / "emulator-tests", help="where to build")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one per core)")
    options = parser.parse_args()

    names = options.operators or operators()
    arguments = [*ARGUMENTS[options.sanitize], "--seed", str(options.seed)]
    if options.rounds is not None:
        arguments += ["--rounds", str(options.rounds)]
    try:
        with toolchain.exclusive(options.out):
            programs = toolchain.in_parallel(
                lambda name: build_test(name, options.sanitize, options.out), names, options.jobs
            )
    except toolchain.Unavailable as missing:
        print(missing, file=sys.stderr)
        return MISSING
    except toolchain.BuildError as error:
        print(error, file=sys.stderr)
        return 1

    passed_all = True
    for name, program in zip(names, programs):
        start = time.monotonic()
        passed, output = run_test(program, options.sanitize, arguments)
        print(f"{'passed' if passed else 'FAILED'} {name} in {time.monotonic() - start:.1f} s: {output}", flush=True)
        passed_all &= passed
    return 0 if passed_all else 1


if __name__ == "__main__":
    sys.exit(main())
