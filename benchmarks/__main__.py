"""All benchmarks of this machine, operators and then training steps: python -m benchmarks [options of both]."""

import sys

from . import bench_ops, penalised_step

if __name__ == "__main__":
    raise SystemExit(bench_ops.main(sys.argv[1:]) or penalised_step.main(sys.argv[1:]))
