"""How the launchers divide their work: every case calls its operator under the emulator, which writes launches down.

The launchers of csrc/cuda are compiled by g++ and asked through the operators' own schemas, on tensors that nobody
touches, so that neither shapes nor grids are told twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .toolchain import CSRC, JOBS, OUT, ROOT, Unavailable

VARIABLE = "ROBUSTKERN_EMULATOR_RECORD"


@dataclass(frozen=True)
class Launch:
    kernel: str  # mangled
    grid: int  # blocks
    block: int  # threads
    sizes: tuple[int, ...]  # of a block and of the grid, in x, y and z each
    shared: int  # dynamic bytes
    parameters: bytes

    @classmethod
    def parse(cls, line: str) -> Launch:
        kernel, *numbers, parameters = line.split(" ")
        gx, gy, gz, bx, by, bz, shared = map(int, numbers)
        sizes = bx, by, bz, gx, gy, gz
        return cls(kernel, gx * gy * gz, bx * by * bz, sizes, shared, bytes.fromhex(parameters))


def build(stems: list[str]) -> Path:
    """The emulated extension with the operators of these sources, unoptimised, since no kernel runs."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_emulator"))
    try:
        emulated, emulator = importlib.import_module("build"), importlib.import_module("toolchain")
    finally:
        sys.path.pop(0)
    try:
        compile_torch, link_torch = emulated.torch_flags()
        flags = [flag for flag in emulator.compile_flags(None, optimization="-O0") if not flag.startswith("-g")]
    except emulator.Unavailable as missing:
        raise Unavailable(str(missing)) from None
    flags += ["-fPIC", "-w", *compile_torch, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-DROBUSTKERN_EMULATED=1"]
    out = OUT / "recorder"
    sources = [*(CSRC / "cuda" / f"{stem}.cu" for stem in stems), CSRC / "ops.cpp", CSRC / "bindings.cpp"]
    objects = [out / (source.name + ".o") for source in sources]

    def compile_one(index: int) -> None:
        emulator.compile_object(sources[index], objects[index], flags)

    with emulator.exclusive(out):
        emulator.in_parallel(compile_one, range(len(sources)), JOBS)
        extension = out / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        emulator.link(objects, extension, ["-shared", *link_torch])
    return extension


def record(names: list[str], stems: list[str]) -> dict[str, list[Launch]]:
    """The launches of these cases, whose kernels these sources hold."""
    extension = build(stems)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, VARIABLE: str(Path(folder) / "launches"), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "benchmarks.cuda_budget.recorder", str(extension)]
        done = subprocess.run(command, input=json.dumps(names), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout)
    return {name: [Launch.parse(line) for line in lines] for name, lines in found.items()}


def main() -> None:
    """In a process of its own: the emulated operators stand where the real ones would."""
    from .cases import CASES
    from .products import PRODUCTS

    spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    written = Path(os.environ[VARIABLE])
    launches = {}
    for name in json.load(sys.stdin):
        written.write_text("")
        (PRODUCTS if name in PRODUCTS else CASES)[name].call()
        launches[name] = written.read_text().splitlines()
    print(json.dumps(launches))


if __name__ == "__main__":
    main()
