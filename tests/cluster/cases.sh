# Started by run.sh in namespaces of its own: SCRATCH PART …, parts slurm, namespaces.
set -euo pipefail
scratch=$1
shift
ip link set lo up
# A machine with a loopback alone has no address in the eyes of the resolver, and Slurm could not start.
ip link add kvds0 type veth peer name kvds1
ip addr add 10.78.0.1/24 dev kvds0
ip link set kvds0 up
ip link set kvds1 up
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false KVDS_VENV=none KVDS_RANKS_PER_NODE=1
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(python -c 'import sys; print(sys.prefix)')/torch_extensions}
recipe=tests/cluster/recipe.yaml
reference=${KVDS_REFERENCE:-$scratch/host}

skip() {
  echo "SKIPPED $part: $*"
  exit 0
}
begun=$SECONDS
pass() {
  printf 'PASSED %s (%d s)\n' "$*" $((SECONDS - begun))
  begun=$SECONDS
}
fail() {
  local log
  printf 'FAILED %s\n' "$*"
  while read -r log; do
    printf '== %s\n' "$log"
    tail -n 30 "$log" | cut -c -500
  done < <(find "$scratch" -maxdepth 1 -name '*.log' -printf '%T@ %p\n' | sort -n | tail -n 4 | cut -d ' ' -f 2)
  exit 1
}

# Waits until a command says yes, at most SECONDS.
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.2
  done
}
trained() { [ -f "$scratch/$1/metrics.jsonl" ] && [ "$(wc -l <"$scratch/$1/metrics.jsonl")" -gt 5 ]; } # RUN: 5 steps
saved() { [ -f "$scratch/$1/checkpoints/latest" ] && trained "$1"; } # RUN: its checkpoint of step 4, and steps beyond

printf 'parts: %s; compared with two ranks on one host without any of this, in %s\n' "$*" "$reference"
if [ ! -d "$reference/student" ]; then
  GPUS=2 bash launch/torchrun.sh $recipe --output_dir "$reference" >"$scratch/host.log" 2>&1 || fail torchrun.sh
  pass "torchrun.sh: two ranks on one host"
fi
for part in "$@"; do
  # Each in a shell of its own: one that is skipped does not skip the others.
  (source "tests/cluster/${part}_cases.sh")
done
