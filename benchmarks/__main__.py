"""All benchmarks of this machine, operators and then training steps: python -m benchmarks [options of both]."""

import sys

from . import bench_ops, bench_steps

if __name__ == "__main__":
    raise SystemExit(bench_ops.main(sys.argv[1:]) or bench_steps.main(sys.argv[1:]))
