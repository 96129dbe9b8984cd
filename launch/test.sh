#!/usr/bin/env bash
# Sets up what is missing, then linters, types, floors and every test that needs no GPU.
#   bash launch/test.sh [pytest arguments]       for example: bash launch/test.sh tests/hostile/test_bad_input.py -k budget
# Without arguments two files are tested at a time (KVDS_TEST_WORKERS; 0: one after the other).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

# One thread per process: ranks and tests share the cores. Offline: no test may depend on the hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() {
  local begun=$SECONDS status=0
  printf '== %s\n' "$*"
  "$@" || status=$?
  printf '== %s: %d s, exit code %d\n' "$1 ${2:-}" $((SECONDS - begun)) "$status"
  return "$status"
}

# Tests of several ranks leave a core idle half of the time, all others leave one idle always. A file stays with one worker,
# as its tests share runs; files begin in the order of tests/conftest.py, not those of the most tests first.
[ $# -gt 0 ] || set -- -n "${KVDS_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder

failed=0
step ruff check . || failed=1
step ruff format --check . || failed=1
step mypy || failed=1
step lint-imports || failed=1
step python -m pytest --durations=15 "$@" || failed=1
exit "$failed"
