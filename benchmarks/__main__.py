"""All benchmarks of this machine: operators, second backwards, cotangents, Jacobians, attacks, methods, training steps.

python -m benchmarks [options]
"""

import sys

from . import (
    bench_attacks,
    bench_cotangents,
    bench_double_backward,
    bench_jacobian,
    bench_methods,
    bench_ops,
    bench_precision,
    penalised_step,
)

if __name__ == "__main__":
    raise SystemExit(
        bench_ops.main(sys.argv[1:])
        or bench_double_backward.main([])
        or bench_cotangents.main([])
        or bench_precision.main([])
        or bench_jacobian.main([])
        or bench_attacks.main([])
        or bench_methods.main([])
        or penalised_step.main(sys.argv[1:])
    )
