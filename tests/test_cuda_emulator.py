"""Tests of the emulator itself: it passes correct kernels and finds every bug planted in them.

The sample kernels contain the bugs below, each off until a run of their test program turns it on. By default each bug
is tried in one build that finds it; ``-m slow`` tries all bugs in all builds, and so measures the table in the README.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "cuda_emulator"
sys.path.insert(0, str(EMULATOR))

import build  # noqa: E402
import toolchain  # noqa: E402

OUT = toolchain.ROOT / "build" / "emulator-tests"

# What finds which bug. "forward" and "orders" run the plain build, in one order of execution and in four; "address" is
# the build with AddressSanitizer and UBSan, "thread" the one with ThreadSanitizer. "*" marks what is tested by default,
# "-" that nothing is found, "?" that it depends on what happens to lie in memory.
WAYS = ("forward", "orders", "address", "thread")
FINDINGS = {
    "missing_barrier": ("wrong result", "wrong result", "wrong result", "race *"),
    "missing_barrier_on_reuse": ("wrong result", "wrong result *", "wrong result", "race"),
    "broadcast_without_barrier": ("-", "wrong result *", "wrong result", "race"),
    "missing_syncwarp": ("wrong result *", "wrong result", "wrong result", "race"),
    "unwritten_shared": ("wrong result *", "wrong result", "wrong result", "wrong result"),
    "shared_overrun": ("?", "?", "undefined *", "?"),
    "dynamic_shared_overrun": ("report *", "report", "address", "report"),
    "tail_overread": ("?", "?", "address *", "?"),
    "unwritten_output": ("wrong result *", "wrong result", "wrong result", "wrong result"),
    "misaligned_vector": ("crash", "crash", "undefined *", "crash"),
    "int32_offset": ("crash *", "crash", "undefined", "-"),
    "rows_on_grid_y": ("report *", "report", "report", "-"),
    "wrong_lane": ("wrong result *", "wrong result", "wrong result", "wrong result"),
    "absent_lane": ("report *", "report", "report", "report"),
    "divergent_shuffle": ("report *", "report", "report", "report"),
    "divergent_barriers": ("report *", "report", "report", "report"),
    "inlined_barriers": ("-", "-", "-", "-"),
    "early_return": ("report *", "report", "report", "report"),
    "lost_update": ("-", "-", "-", "race *"),
    "missing_async_wait": ("report *", "report", "report", "report"),
    "missing_barrier_after_wait": ("wrong result *", "wrong result", "wrong result", "race *"),
    "transposed_fragment": ("wrong result *", "wrong result", "wrong result", "wrong result"),
}
BUILD = {"forward": None, "orders": None, "address": "address", "thread": "thread"}
# --huge adds the last block of a grid whose flat index passes 2^31. ThreadSanitizer has no room for that much memory.
ARGUMENTS = {
    "forward": ["--order", "0", "--huge"],
    "orders": ["--huge"],
    "address": ["--huge"],
    "thread": ["--rounds", "6"],
}
# What the emulator says of the bugs that it names itself.
REPORTS = {
    "dynamic_shared_overrun": "dynamic shared memory was written past its ends",
    "rows_on_grid_y": r"invalid grid \(1,70000,1\)",
    "absent_lane": "shuffle from lane 31, which takes no part",
    "divergent_shuffle": r"deadlock; block \(\d+,0,0\)\n  threads .*: shuffle at sample_kernels.cu:\d+, mask 0xf{8}",
    "divergent_barriers": "threads of one block wait at different __syncthreads",
    "early_return": "__syncthreads missed by threads that have returned",
    "missing_async_wait": "the target of an asynchronous copy was written on the way",
}
DEFAULT = [(bug, way) for bug, found in FINDINGS.items() for way, what in zip(WAYS, found) if what.endswith("*")]

try:
    toolchain.compiler()
    toolchain.cuda_include_directories()
    missing = ""
except toolchain.Unavailable as reason:
    missing = str(reason)
needs_toolchain = pytest.mark.skipif(bool(missing), reason=missing)


def flags(sanitize: str | None) -> list[str]:
    return toolchain.compile_flags(sanitize, optimization="-O1")


def compile_test(source: str, sanitize: str | None) -> Path:
    """Compiles one file of the emulator's folder; returns the object."""
    target = OUT / f"{Path(source).stem}-{sanitize}.o"
    toolchain.compile_object(EMULATOR / source, target, flags(sanitize))
    return target


def link_test(name: str, sanitize: str | None, objects: list[Path]) -> Path:
    """Links a test program; returns its path."""
    target = OUT / f"{name}-{sanitize}"
    toolchain.link(objects, target, [flag for flag in flags(sanitize) if flag.startswith("-fsanitize=")])
    return target


def execute(program: Path, sanitize: str | None, *arguments: str) -> tuple[str, str]:
    """Runs a test program; returns what it found, in one word, and its output."""
    environment = {**os.environ, **toolchain.sanitizer_environment(sanitize)}
    result = subprocess.run(
        [program, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    output = result.stdout + result.stderr
    named = {
        "race": "ThreadSanitizer: data race",
        "crash": r"Sanitizer:(DEADLYSIGNAL| SEGV)",
        "undefined": "runtime error: ",
        "address": "ERROR: AddressSanitizer",
    }
    for finding, pattern in named.items():
        if re.search(pattern, output):
            return finding, output
    codes = {0: "-", 1: "wrong result", 2: "report"}
    return codes.get(result.returncode, "crash" if result.returncode < 0 else "error"), output


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    """The sample kernels' test program, for every way of running it."""
    sanitizers = list(toolchain.SANITIZERS)
    jobs = [(source, name) for name in sanitizers for source in ("sample_kernels.cu", "test_sample_kernels.cpp")]
    with toolchain.exclusive(OUT):
        objects = toolchain.in_parallel(lambda job: compile_test(*job), jobs)
        built = {name: link_test("sample", name, objects[2 * i : 2 * i + 2]) for i, name in enumerate(sanitizers)}
    return {way: built[BUILD[way]] for way in WAYS}


def find(programs: dict[str, Path], bug: str, way: str) -> tuple[str, str]:
    """Runs the sample kernels with one bug; returns what was found, and the program's output."""
    return execute(programs[way], BUILD[way], "--plant", bug, *ARGUMENTS[way])


@needs_toolchain
@pytest.mark.parametrize("way", WAYS)
def test_correct_kernels_pass(programs: dict[str, Path], way: str) -> None:
    finding, output = find(programs, "none", way)
    assert finding == "-", output


@needs_toolchain
@pytest.mark.parametrize(("bug", "way"), DEFAULT)
def test_planted_bug_is_found(programs: dict[str, Path], bug: str, way: str) -> None:
    finding, output = find(programs, bug, way)
    assert finding == FINDINGS[bug][WAYS.index(way)].removesuffix(" *"), output
    assert re.search(REPORTS.get(bug, ""), output), output


@needs_toolchain
@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "way"), [(bug, way) for bug, found in FINDINGS.items() for way, what in zip(WAYS, found) if what != "?"]
)
def test_table_of_findings(programs: dict[str, Path], bug: str, way: str) -> None:
    finding, output = find(programs, bug, way)
    assert finding == FINDINGS[bug][WAYS.index(way)].removesuffix(" *"), output


def test_every_bug_has_a_row() -> None:
    planted = re.findall(r"^  BUG\((\w+)\)", (EMULATOR / "sample_kernels.h").read_text(), re.MULTILINE)
    assert planted == list(FINDINGS)
    assert {bug for bug, _ in DEFAULT} | {"inlined_barriers"} == set(FINDINGS), "every bug that is found is tested"
    table = (EMULATOR / "README.md").read_text()
    for bug, found in FINDINGS.items():
        row = f"| `{bug}` | " + " | ".join(what.removesuffix(" *") for what in found) + " |"
        assert row in table, f"the README lacks the row {row}"


@needs_toolchain
@pytest.mark.parametrize(
    "sanitize", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("address", "thread"))]
)
@pytest.mark.parametrize("name", ["primitives", "mma"])
def test_primitives(name: str, sanitize: str | None) -> None:
    with toolchain.exclusive(OUT):
        program = link_test(name, sanitize, [compile_test(f"test_{name}.cpp", sanitize)])
    finding, output = execute(program, sanitize)
    assert finding == "-", output


@needs_toolchain
@pytest.mark.slow
def test_primitives_with_portable_fibers() -> None:
    target = OUT / "primitives-ucontext.o"
    with toolchain.exclusive(OUT):
        toolchain.compile_object(EMULATOR / "test_primitives.cpp", target, [*flags(None), "-DCUDA_EMULATOR_UCONTEXT"])
        program = link_test("primitives-ucontext", None, [target])
    finding, output = execute(program, None)
    assert finding == "-", output


USE_SAMPLE_EXTENSION = """
import importlib.util, os, sys, torch
spec = importlib.util.spec_from_file_location("_C", os.environ["ROBUSTKERN_EMULATED"])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
x = torch.randn(1001)
for bug in map(int, sys.argv[1:]):
    try:
        print("right:", torch.equal(torch.ops.emulator_sample.double_rows(x, bug), 2 * x), flush=True)
    except RuntimeError as error:
        print("raised:", error, flush=True)
"""


def use_sample_extension(sanitize: str | None, *bugs: int, order: str = "forward") -> str:
    """Builds the sample extension as build.py would, calls its operator in a new Python; returns the output."""
    extension = build.build_extension(EMULATOR / "sample_extension", OUT / f"extension-{sanitize}", sanitize)
    environment = {**os.environ, **build.environment(extension, sanitize), "ROBUSTKERN_EMULATOR_ORDER": order}
    command = [sys.executable, "-c", USE_SAMPLE_EXTENSION, *map(str, bugs)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    return result.stdout + result.stderr


@needs_toolchain
def test_report_reaches_python() -> None:
    output = use_sample_extension(None, 0, 1, 0)
    assert output.count("right: True") == 2, output
    assert "double_rows: CUDA emulator: __syncthreads missed by threads that have returned; block (7,0,0)" in output, (
        output
    )
    assert "threads 105..127: returned" in output, output


@needs_toolchain
def test_order_from_environment() -> None:
    assert "right: True" in use_sample_extension(None, 0, order="reverse")
    output = use_sample_extension(None, 0, order="sideways")
    assert "ROBUSTKERN_EMULATOR_ORDER must be forward, reverse or a number, got 'sideways'" in output


@needs_toolchain
@pytest.mark.slow
def test_address_sanitizer_guards_tensors() -> None:
    output = use_sample_extension("address", 0, 1, 2)
    assert "right: True" in output, output
    assert "raised:" in output, output
    assert re.search(r"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*double_rows\.cu", output), output


def test_missing_compiler_is_one_line_and_code_77() -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    command = [sys.executable, str(EMULATOR / "build.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == build.MISSING
    assert result.stderr == "the CUDA emulator needs a C++ compiler, and no-such-compiler is not on the PATH\n"
