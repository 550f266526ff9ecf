#!/usr/bin/env bash
# Everything worth knowing from a machine with an NVIDIA GPU, in at most nine minutes and without a network:
# builds both extensions in place, runs the tests on the device and compute-sanitizer beside them, then all benchmarks.
#
#   [PYTHON=python3] [OUT=folder] [ROBUSTKERN_COMMIT=id] benchmarks/gpu.sh
#
# Needs Python with PyTorch for CUDA, pytest, hypothesis, pybind11 and ninja; nvcc; compute-sanitizer if there is one.
# Leaves benchmarks/results/<device>.json, copied to $OUT with the logs if OUT is set, and prints a summary last.
# Exit status: 0 if every stage passed.  A stage that fails or runs past its time leaves the later ones alone.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
LOGS=${OUT:-$(mktemp -d)}
mkdir -p "$LOGS"
export ROBUSTKERN_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset ROBUSTKERN_EMULATED
SUMMARY=()
FAILED=0
STARTED=$SECONDS

note() { # stage, exit status, seconds, last line of its log
  local verdict=passed
  case $2 in 0) ;; 124 | 137) verdict='OUT OF TIME' ;; *) verdict="FAILED ($2)" ;; esac
  [ "$2" -eq 0 ] || FAILED=1
  SUMMARY+=("$(printf '%-22s %-12s %4d s  %s' "$1" "$verdict" "$3" "$4")")
}

stage() { # name, time limit in seconds, command...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  note "$name" "$status" "$((SECONDS - begin))" "$(grep -v '^ *$' "$LOGS/$name.log" | tail -n 1 | cut -c1-110)"
  return "$status"
}

build() {
  local capability
  capability=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return 1
  ROBUSTKERN_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} MAX_JOBS=$(nproc) \
    "$PYTHON" setup.py build_ext --inplace || return 1
  "$PYTHON" -c '
import torch
from robustkern import _library
missing = _library.why_unavailable() or _library.cuda_why_unavailable()
assert missing is None, missing
assert torch.cuda.is_available(), "PyTorch sees no device"
print("built and loaded for", torch.cuda.get_device_name())'
}

suite() {
  local parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
  "$PYTHON" -m pytest tests -m cuda -q -rf --maxfail=30 "${parallel[@]}" -p no:cacheprovider
}

sanitize() { # tool
  local filter=()
  # Only this project's kernels: PyTorch's own are not at issue, and instrumenting them takes minutes.
  compute-sanitizer --help 2>&1 | grep -q -e '--kernel-name ' && filter=(--kernel-name kns=rk)
  # Without the caching allocator every tensor is an allocation of its own, whose bounds the tool knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${filter[@]}" \
    "$PYTHON" -m benchmarks.exercise
}
export -f build suite sanitize
export PYTHON

if ! stage build 120 bash -c build; then
  tail -n 30 "$LOGS/build.log"
else
  # Tests and tools check, they do not time: they may share the device.
  TOOLS=(memcheck racecheck synccheck initcheck)
  command -v compute-sanitizer >/dev/null || { TOOLS=(); note compute-sanitizer 127 0 'is not installed'; }
  for tool in ${TOOLS[@]+"${TOOLS[@]}"}; do
    (
      begin=$SECONDS
      timeout --kill-after=5 140 bash -c "sanitize $tool" >"$LOGS/$tool.log" 2>&1
      echo "$? $((SECONDS - begin))" >"$LOGS/$tool.status"
    ) &
  done
  stage suite 140 bash -c suite
  wait
  for tool in ${TOOLS[@]+"${TOOLS[@]}"}; do
    read -r status seconds <"$LOGS/$tool.status"
    rm -f "$LOGS/$tool.status"
    note "$tool" "$status" "$seconds" "$(grep -E 'SUMMARY|samples' "$LOGS/$tool.log" | tail -n 1 | cut -c1-110)"
  done
  # What is left of nine minutes, in halves.  Compilation stops in time for every case to be measured without it.
  left=$((535 - (SECONDS - STARTED)))
  half=$((left / 2))
  stage bench_ops "$half" "$PYTHON" -m benchmarks.bench_ops --device cuda --sizes large small --seconds 0.15 \
    --compile-budget $((half * 6 / 10)) --budget $((half * 9 / 10))
  stage penalised_step "$((535 - (SECONDS - STARTED)))" "$PYTHON" -m benchmarks.penalised_step --device cuda \
    --seconds 0.5 --compile-budget $((half * 5 / 10)) --budget $((half * 8 / 10)) --limit $((half * 3 / 10))
fi

if [ -n "${OUT:-}" ]; then
  cp benchmarks/results/*.json "$OUT"/ 2>/dev/null
fi
grep -hE ' of copy|^[a-z].*[0-9]x[0-9]|  [a-z_]+ +[0-9.]+ ms ' "$LOGS"/bench_ops.log "$LOGS"/penalised_step.log 2>/dev/null | grep -v USDT | cut -c1-180
echo
echo "== $((SECONDS - STARTED)) s, logs in $LOGS"
grep -hE '^(FAILED|ERROR) ' "$LOGS/suite.log" 2>/dev/null | head -n 20
printf '%s\n' "${SUMMARY[@]}"
exit "$FAILED"
