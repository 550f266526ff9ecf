#!/usr/bin/env bash
# Everything worth knowing from a machine with an NVIDIA GPU, in at most nine minutes and without a network.
#
#   [PYTHON=python3] [OUT=folder] [SECONDS_IN_ALL=540] [ROBUSTKERN_COMMIT=id] benchmarks/gpu.sh [cpu]
#
# Builds for this GPU; holds every operator to float64, attention's backends and CUDA graphs to the eager step; runs
# compute-sanitizer over all operators, a sample of the tests beside it; then, alone, times kernels by graph replay,
# counts those that miss their budget with ncu, and times training steps.
#
# Needs Python with PyTorch for CUDA, pytest, hypothesis and ninja; nvcc; compute-sanitizer and ncu if there.
# Every stage prints its line when it ends.  benchmarks/results/<device>.json is written after every case, and copied
# with the logs to $OUT if that is set, also when the script is stopped: what was measured stays.
# Exit status: 0 if every stage passed.  A stage that fails or runs past its time leaves the later ones alone.
#
# With `cpu` every stage runs in the form that it has on a CPU, in little time: a rehearsal.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

DEVICE=${1:-cuda}
PYTHON=${PYTHON:-python3}
LOGS=${OUT:-$(mktemp -d)}
IN_ALL=${SECONDS_IN_ALL:-540}
mkdir -p "$LOGS"
export PYTHONUNBUFFERED=1 DEVICE LOGS PYTHON
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset ROBUSTKERN_EMULATED
[ "$DEVICE" = cpu ] || export ROBUSTKERN_REQUIRE_CUDA=1
FAILED=0
STARTED=$SECONDS

left() { echo $((IN_ALL - (SECONDS - STARTED))); }

note() { # stage, exit status, seconds, what it found
  local verdict=passed
  case $2 in 0) ;; 77) verdict=skipped ;; 124 | 137) verdict='OUT OF TIME' ;; *) verdict="FAILED ($2)" ;; esac
  case $2 in 0 | 77) ;; *) FAILED=1 ;; esac
  printf '%4d s  %-12s %-12s %4d s  %s\n' $((SECONDS - STARTED)) "$1" "$verdict" "$3" "$4" | tee -a "$LOGS/summary.txt"
}

last_line() { grep -av '^ *$' "$1" | tail -n 1 | cut -c1-150; }

stage() { # name, time limit in seconds, command...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  [ "$DEVICE" = cuda ] || limit=$((4 * limit)) # a rehearsal is not in a hurry, and shares its cores
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    note "$name" 124 0 'no time is left'
    return 124
  fi
  timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  note "$name" "$status" "$((SECONDS - begin))" "$(last_line "$LOGS/$name.log")"
  grep -aE '^(FAILED|ERROR|X) ' "$LOGS/$name.log" | head -n 8 | cut -c1-200
  return "$status"
}

build() {
  if [ "$DEVICE" = cuda ]; then
    : "${TORCH_CUDA_ARCH_LIST:=$("$PYTHON" -c '
import torch
print("{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "")')}"
    [ -n "$TORCH_CUDA_ARCH_LIST" ] || {
      echo 'PyTorch sees no device; TORCH_CUDA_ARCH_LIST=9.0 builds for one that is not here'
      return 1
    }
    export ROBUSTKERN_CUDA=1 TORCH_CUDA_ARCH_LIST MAX_JOBS=${MAX_JOBS:-$(nproc)}
    # All three at once, where setup.py takes one after the other: each waits for one long file.
    local name builders=()
    for name in _C _aten _cuda; do
      "$PYTHON" -c '
import runpy, setuptools, sys
name, whole = sys.argv.pop(1), setuptools.setup
setuptools.setup = lambda **k: whole(**{**k, "ext_modules": [e for e in k["ext_modules"] if e.name.endswith(name)]})
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")' "$name" build_ext --inplace --build-temp "build/gpu$name" &
      builders+=($!)
    done
    for name in "${builders[@]}"; do wait "$name" || return 1; done
  fi
  "$PYTHON" -c '
import os, torch
from robustkern import _library
missing = _library.why_unavailable() or (os.environ["DEVICE"] == "cuda" and _library.cuda_why_unavailable())
assert not missing, missing
assert os.environ["DEVICE"] == "cpu" or torch.cuda.is_available(), "PyTorch sees no device"
print("built and loaded for", torch.cuda.get_device_name() if os.environ["DEVICE"] == "cuda" else "the CPU")'
}

suite() { # a few cases of every test
  local options=(--few 4 tests -m cuda --continue-on-collection-errors)
  "$PYTHON" -c 'import xdist' 2>/dev/null && options+=(-n 6)
  [ "$DEVICE" = cpu ] && options=(--few 1 tests/test_double_backward.py)
  "$PYTHON" -m pytest "${options[@]}" -q -rf --maxfail=30 -p no:cacheprovider
}

sanitize() { # tool
  if [ "$DEVICE" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not here, the samples run without it"
    "$PYTHON" -m benchmarks.exercise --device "$DEVICE" --seconds 2
    return 77
  fi
  local filter=()
  # Only this project's kernels: PyTorch's own are not at issue, and instrumenting them takes minutes.  initcheck is
  # not among the tools: it would have to follow what PyTorch's kernels write, and takes it for never written.
  compute-sanitizer --help 2>&1 | grep -q -e '--kernel-name ' && filter=(--kernel-name kns=2rk4cuda)
  # Libraries ask the runtime what it cannot do, and take no for an answer.
  compute-sanitizer --help 2>&1 | grep -q -e '--report-api-errors ' && filter+=(--report-api-errors no)
  # Without the caching allocator every tensor is an allocation of its own, whose bounds the tool knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${filter[@]}" \
    "$PYTHON" -m benchmarks.exercise --device cuda --seconds 75
}

count() { # what the hardware counts of the kernels that miss their budget
  [ "$DEVICE" = cuda ] && command -v ncu >/dev/null || {
    echo 'ncu is not here'
    return 77
  }
  "$PYTHON" -m benchmarks.gpu_kernels --counters "$LOGS/kernels.json"
}

finish() {
  [ -n "${OUT:-}" ] && cp benchmarks/results/*.json "$OUT"/ 2>/dev/null
  echo "== $((SECONDS - STARTED)) s, logs in $LOGS"
}
trap finish EXIT
trap 'echo "stopped"; exit 130' INT TERM
export -f build suite sanitize count

stage build 130 bash -c build || {
  tail -n 30 "$LOGS/build.log"
  exit 1
}
small=() columns=(plain eager installed installed_graph compile)
[ "$DEVICE" = cpu ] && small=(--size tiny) && columns=(plain eager installed)
stage checks 60 "$PYTHON" -m benchmarks.gpu_checks --device "$DEVICE"
stage operators 75 "$PYTHON" -m benchmarks.exercise --device "$DEVICE" --check --seconds 60 \
  --dtypes float32 bfloat16 float16 float64

# Tests and tools check, they do not time: they may share the device.
for tool in memcheck racecheck synccheck; do
  stage "$tool" 100 bash -c "sanitize $tool" &
done
stage suite 100 bash -c suite
wait
grep -qE 'FAILED|OUT OF TIME' "$LOGS/summary.txt" && FAILED=1 # stages beside this shell cannot set it

stage kernels 90 "$PYTHON" -m benchmarks.gpu_kernels --device "$DEVICE" "${small[@]}" --out "$LOGS/kernels.json"
stage counters 80 bash -c count
stage steps "$(($(left) - 5))" "$PYTHON" -m benchmarks.penalised_step --device "$DEVICE" "${small[@]}" \
  --providers "${columns[@]}" --seconds 0.5 --limit 40 \
  --compile-budget 60 --budget "$(($(left) - 40))"
grep -hE ' of copy|^[a-zA-Z].*[0-9]x[0-9]|  [a-z_]+ +[0-9.]+ ms ' "$LOGS"/kernels.log "$LOGS"/steps.log 2>/dev/null |
  grep -v USDT | cut -c1-180
exit "$FAILED"
