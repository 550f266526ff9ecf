#!/bin/sh
# Runs the CUDA kernels on the CPU:
#   1. their own tests in C++, in several orders of execution, under ThreadSanitizer, and under AddressSanitizer with UBSan
#   2. the operators' Python tests through them: plain, then under AddressSanitizer with UBSan
# The emulator's own tests, which plant a bug of each kind, are tests/test_cuda_emulator.py.
# Usage: tests/cuda_emulator/run.sh [python]
set -u
python=${1:-python3}
cd "$(dirname "$0")/../.." || exit 1
suite="tests/test_accuracy.py tests/test_cotangents.py tests/test_determinism.py tests/test_layouts.py tests/test_numerics.py tests/test_arguments.py tests/test_double_backward.py tests/test_attention_kernels.py"

run() { # a step that needs g++ and the CUDA toolkit's headers exits with 77 where they are missing
  echo "== $*"
  "$@"
  status=$?
  if [ $status -eq 77 ]; then
    echo "test-cuda-emulated: skipped: g++ or the CUDA toolkit's headers are missing"
    exit 0
  fi
  [ $status -eq 0 ] || exit $status
}

emulator=tests/cuda_emulator
run "$python" $emulator/run_kernel_tests.py
run "$python" $emulator/run_kernel_tests.py --sanitize thread
run "$python" $emulator/run_kernel_tests.py --sanitize address
run "$python" $emulator/build.py
library=$("$python" $emulator/build.py | tail -n 1)
# shellcheck disable=SC2086
run env ROBUSTKERN_EMULATED="$library" "$python" -m pytest -n 2 $suite
run env ROBUSTKERN_EMULATED="$library" "$python" -m pytest tests/test_installed.py -k gradgradcheck
run env ROBUSTKERN_EMULATED="$library" ROBUSTKERN_EMULATOR_ORDER=reverse "$python" -m pytest tests/test_cotangents.py
run env ROBUSTKERN_EMULATED="$library" ROBUSTKERN_EMULATOR_ORDER=3 "$python" -m pytest tests/test_install_attention.py -k blocks
run "$python" $emulator/build.py --sanitize address
library=$("$python" $emulator/build.py --sanitize address | tail -n 1)
# shellcheck disable=SC2046,SC2086
run env $("$python" $emulator/build.py --sanitize address --print-env) ROBUSTKERN_EMULATED="$library" \
  "$python" -m pytest -n 2 -k "not long and not compile" tests/test_accuracy.py tests/test_layouts.py
