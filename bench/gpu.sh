#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, by one command: `make gpu`, or `bench/gpu.sh`.
#
# Builds the CUDA part in place, compares every kernel with float64, runs the tests that need a GPU (CUDA graphs and
# other streams among them), runs small problems under compute-sanitizer, and measures, the most telling kernels first.
# Needs no network, but a Python ($PYTHON) that has torch with CUDA and what the extras [test,bench] name, setuptools,
# cmake and ninja; nvcc and compute-sanitizer on the PATH or in /usr/local/cuda/bin.
#
# What each step printed is in $FOLDER/STEP.log; the last thing printed is a table, also in bench/results/gpu_DEVICE.json
# with every error and its budget. Exit status 1 where a step failed, or a kernel could not run at all.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-gpu-results}
DEADLINE=${DEADLINE:-540} # seconds, for all steps together
STEPS=${STEPS:-.}         # a regular expression: only steps whose names it matches
WORKERS=${WORKERS:-4}     # processes of pytest
PATH=$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH:/usr/local/cuda/bin
mkdir -p "$FOLDER"
: >"$FOLDER/steps.txt"
rm -f "$FOLDER"/check*.json # of an earlier run
# WITHOUT_GPU=1 goes on where torch sees no GPU, to try this script.
[ -n "${WITHOUT_GPU:-}" ] || "$PYTHON" bench/gpu.py --seen || exit 1

# step NAME SECONDS COMMAND...: run it within what is left of the time, and note how it ended.
step() {
  local name=$1 most=$2 began=$SECONDS status result
  shift 2
  [[ $name =~ $STEPS ]] || return 0
  local left=$((DEADLINE - SECONDS))
  if ((left < most)); then most=$left; fi
  if [[ $name == sanitizer-* ]] && ! command -v compute-sanitizer >/dev/null; then
    result="not run: there is no compute-sanitizer"
  elif ((most <= 0)); then
    result="not run: the time was up"
  else
    echo "$name: $*"
    timeout --kill-after=5 "$most" "$@" >"$FOLDER/$name.log" 2>&1
    status=$?
    result=ok
    if ((status == 124 || status == 137)); then
      result="FAILED: not done after $most s"
    elif ((status != 0)); then result="FAILED with status $status"; fi
    if [[ $name == sanitizer-* ]] && grep -q "Device not supported" "$FOLDER/$name.log"; then
      result="not run: compute-sanitizer does not support this device"
    fi
    tail -n "$([ "$result" = ok ] && echo 8 || echo 60)" "$FOLDER/$name.log" | sed 's/^/    /'
  fi
  printf '%s\t%s\t%s\n' "$name" "$((SECONDS - began))" "$result" >>"$FOLDER/steps.txt"
  [ "$result" = ok ]
}

cli="-m fishleg_ext.cli"
step build 180 env FISHLEG_EXT_CUDA=1 "$PYTHON" -m pip install --editable . --no-build-isolation --no-deps || DEADLINE=0
step info 60 "$PYTHON" $cli info
# What need not be alone on the GPU, side by side, with few threads each. Other versions of torch may warn of other
# things. For the sanitizers each tensor is an allocation of its own, so that accesses beyond it are seen; torch and
# Triton may try calls that fail, and torch's own kernels are not looked at.
few="OMP_NUM_THREADS=2"
exclude=$(compute-sanitizer --help 2>/dev/null | grep -o -m 1 -- '--kernel-[a-z]*-exclude') # its name has changed
sanitizer="env $few PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9"
sanitizer+="${exclude:+ $exclude kns=at6native} --tool"
step check 240 env $few "$PYTHON" $cli check --impl triton --impl cuda --json "$FOLDER/check.json" &
step check-reference 240 env $few "$PYTHON" $cli check --impl reference --json "$FOLDER/check_reference.json" &
step tests 240 env $few "$PYTHON" -m pytest -m "gpu or triton or cuda" -n "$WORKERS" -rs -W default &
step sanitizer-memcheck 150 $sanitizer memcheck --report-api-errors no "$PYTHON" bench/gpu.py --small-calls &
step sanitizer-racecheck 150 $sanitizer racecheck "$PYTHON" bench/gpu.py --small-calls &
wait
step missing 10 "$PYTHON" bench/gpu.py --missing "$FOLDER/check.json"
for family in obs select masks kron block_fisher quantize diag_fisher; do
  step "bench-$family" 120 "$PYTHON" $cli bench "$family"
done
"$PYTHON" bench/gpu.py --summary "$FOLDER" ${WITHOUT_GPU:+--results "$FOLDER"}
