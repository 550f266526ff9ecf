"""A budget for the CUDA kernels that needs nvcc and no GPU: python -m benchmarks.cuda_budget [--only REGEX].

Compiles csrc/cuda for sm_90, reads every kernel's main loop in the machine code, and fails where a kernel's own bound
falls below 85 % of a copy, unless its floor is arithmetic and said so; of kernels of matrix products, where one keeps
registers in memory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from . import products, report
from .cases import CASES, Case
from .model import Prediction, Reading, Unread, predict, read
from .recorder import Launch, record
from .sass import Kernel, parse
from .toolchain import Unavailable, disassembled


def analyse(case: Case, launches: list[Launch], kernels: dict[str, Kernel]) -> Prediction:
    """One case, from what was launched and what was compiled."""
    readings: list[Reading] = []
    rounds: list[int] = []
    for launch in launches:
        stated = next((kernel for kernel in case.kernels if re.search(kernel.name, launch.kernel)), None)
        if stated is None:
            raise Unread(f"{report.stem(launch.kernel)} is not among the kernels of the case")
        if not stated.sweeps:
            rounds.append(stated.rounds)
        elif launch.kernel not in kernels:
            raise Unread(f"{launch.kernel} was not compiled")
        else:
            together = sum(other.grid for other in launches if other.kernel == launch.kernel)
            readings.append(read(case, stated, launch, kernels[launch.kernel], launch.grid / together))
    return predict(case, readings, rounds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_budget", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="REGEX", default="", help="the cases whose name it finds")
    parser.add_argument("--list", action="store_true", help="names of cases, nothing compiled")
    parser.add_argument("--write", action="store_true", help="the tables into docs/cuda-budget.md")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write is for all cases")
    cases = [case for name, case in CASES.items() if re.search(options.only, name)]
    of_products = [case for name, case in products.PRODUCTS.items() if re.search(options.only, name)]
    names = [case.name for case in (*cases, *of_products)]
    if options.list:
        print("\n".join(names))
        return 0
    if not names:
        parser.error(f"no case is called {options.only}: see --list")
    try:
        sources = sorted({case.source for case in (*cases, *of_products)})
        code = {source: parse(*texts) for source, texts in disassembled(sources).items()}
        launches = record(names, sources)
    except Unavailable as missing:
        print(f"cuda-budget: skipped: {missing}")
        return 0
    rows, calls, unread = [], [], []
    failed = False
    for case in cases:
        try:
            prediction = analyse(case, launches[case.name], code[case.source])
        except Unread as reason:
            unread.append(f"{case.name}: {reason}")
            continue
        rows += report.rows_of(prediction)
        calls.append(report.call_row(prediction))
        failed = failed or not all(reading.passed for reading in prediction.readings)
    multiplied = [row for case in of_products
                  for row in products.rows_of(case, launches[case.name], code[case.source])]  # fmt: skip
    failed = failed or any(row["local"] for row in multiplied)
    if options.json:
        print(json.dumps({"kernels": rows, "calls": calls, "products": multiplied, "unread": unread}, indent=1))
    elif options.write:
        report.PAGE.write_text(report.page(rows, calls, multiplied))
    else:
        tables = (report.plain(table) for table in (rows, calls, multiplied) if table)
        print(*tables, report.in_words(), *unread, sep="\n\n")
    return 1 if failed or unread else 0


if __name__ == "__main__":
    sys.exit(main())
