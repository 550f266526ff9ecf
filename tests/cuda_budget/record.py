"""Writes sample.sass, which the budget's tests read: the machine code of sample.cu, and ptxas's report."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))


def disassembled() -> tuple[str, str]:
    """The machine code in words, and the report."""
    from benchmarks.cuda_budget import toolchain

    toolchain.OUT.mkdir(parents=True, exist_ok=True)
    cubin = toolchain.OUT / "sample.cubin"
    command = [toolchain.nvcc_command()[0], "-std=c++20", "-O3", f"-arch=sm_{toolchain.ARCHITECTURE}", "-Xptxas=-v"]
    _, report = toolchain.run([*command, "-cubin", str(HERE / "sample.cu"), "-o", str(cubin)])
    words, _ = toolchain.run([str(toolchain.find_nvdisasm()), "-c", "-hex", str(cubin)])
    return words, report


if __name__ == "__main__":
    words, report = disassembled()
    kept = (line.rstrip() for line in [*words.splitlines(), *report.splitlines()])
    (HERE / "sample.sass").write_text("\n".join(line for line in kept if line) + "\n")
    subprocess.run(["wc", "-l", str(HERE / "sample.sass")], check=True)
