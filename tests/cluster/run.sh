#!/usr/bin/env bash
# The launch files on the real thing: Slurm with two nodes on this machine, and two network namespaces as hosts.
#   bash tests/cluster/run.sh [slurm|namespaces]       (default: both; as root, some minutes; skips with a reason)
# Needs an environment with kvds's dependencies; installs Debian's slurm-wlm and munge where they are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
  echo "SKIPPED: $*"
  exit 0
}
[ "$(id -u)" -eq 0 ] || skip 'a cluster of its own needs root'
command -v ip >/dev/null || skip 'ip (iproute2) is missing'
unshare -m -n true 2>/dev/null || skip 'this container may not make namespaces (docker: --privileged)'
if [ -z "${KVDS_CLUSTER_SCRATCH:-}" ]; then
  KVDS_CLUSTER_SCRATCH=$(mktemp -d /tmp/kvds-cluster.XXXXXX)
  export KVDS_CLUSTER_SCRATCH
  trap 'rm -rf "$KVDS_CLUSTER_SCRATCH"' EXIT
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
      >"$KVDS_CLUSTER_SCRATCH/apt.txt" 2>&1 || true # the part that needs them says so
  fi
  # Namespaces of its own: /etc/hosts, /run/netns and ports are this script's, whatever else runs on the machine.
  status=0
  unshare -m -n --propagation private bash "$0" "$@" || status=$?
  exit $status
fi
ip link set lo up
# A machine with a loopback alone has no address in the eyes of the resolver, and Slurm could not start.
ip link add kvds0 type veth peer name kvds1
ip addr add 10.78.0.1/24 dev kvds0
ip link set kvds0 up
ip link set kvds1 up
scratch=$KVDS_CLUSTER_SCRATCH
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false KVDS_VENV=none KVDS_RANKS_PER_NODE=1
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(python -c 'import sys; print(sys.prefix)')/torch_extensions}
recipe=tests/cluster/recipe.yaml
long=30

begun=$SECONDS
passed=0
pass() {
  passed=$((passed + 1))
  printf 'PASSED %s (%d s)\n' "$*" $((SECONDS - begun))
  begun=$SECONDS
}
fail() {
  printf 'FAILED %s\n' "$*"
  for log in "$scratch"/*.log; do
    printf '== %s\n' "$log"
    tail -n 25 "$log"
  done
  exit 1
}

# Waits until RUN has a checkpoint of step 4 and records beyond it; fails after SECONDS.
wait_for_step() {
  local i
  for ((i = 0; i < 5 * $2; i++)); do
    if [ -f "$1/checkpoints/latest" ] && [ "$(wc -l <"$1/metrics.jsonl")" -gt 5 ]; then return 0; fi
    sleep 0.2
  done
  return 1
}

printf 'Two ranks on one host, without any of this: 12 and %d steps.\n' $long
for run in host host-long; do
  steps=(--max_steps $long --save_steps 0)
  [ $run = host ] && steps=()
  GPUS=2 bash launch/torchrun.sh $recipe "${steps[@]}" --output_dir "$scratch/$run" >"$scratch/$run.log" 2>&1 || fail $run
done
pass "torchrun.sh: the reference, two ranks on one host"

case ${1:-all} in
  slurm) source tests/cluster/slurm_cases.sh ;;
  namespaces) source tests/cluster/namespace_cases.sh ;;
  all)
    # Each in a shell of its own: one that is skipped does not skip the other.
    (source tests/cluster/slurm_cases.sh)
    (source tests/cluster/namespace_cases.sh)
    ;;
  *) fail "unknown part $1; expected slurm or namespaces" ;;
esac
