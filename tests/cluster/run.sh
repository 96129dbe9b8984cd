#!/usr/bin/env bash
# The launch files on the real thing: Slurm with two nodes on this machine, two network namespaces as hosts, and an installation from
# a folder of wheels without a network.
#   bash tests/cluster/run.sh [PART …]     (as root; default: slurm namespaces wheelhouse, some six minutes on two cores)
# Where apt or namespaces are not allowed, or no package index is within reach, a part is skipped with a reason. Calls that share a
# folder KVDS_REFERENCE make the run that all results are compared with only once.
# Debian's slurm-wlm and munge are installed where they are missing, Python's packages where no active environment has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
  echo "SKIPPED $*"
  exit 0
}
[ "$(id -u)" -eq 0 ] || skip 'all: a cluster of its own needs root'
command -v ip >/dev/null || skip 'all: ip is missing (apt install iproute2)'
own=(unshare --mount --pid --fork --kill-child --mount-proc --propagation private)
"${own[@]}" --net true 2>/dev/null || skip 'all: this container may not make namespaces (docker: --privileged)'
[ $# -gt 0 ] || set -- slurm namespaces wheelhouse
for part in "$@"; do
  case $part in
    slurm | namespaces | wheelhouse) ;;
    *)
      echo "run.sh: unknown part $part; expected slurm, namespaces or wheelhouse" >&2
      exit 2
      ;;
  esac
done
# shellcheck disable=SC1091
python -c 'from importlib.metadata import version; [version(name) for name in ("torch", "deepspeed", "mlflow")]' 2>/dev/null \
  || source launch/setup.sh

scratch=$(mktemp -d /tmp/kvds-cluster.XXXXXX)
running=''
clean_up() {
  # The first process of a namespace takes all others with it: daemons, jobs, ranks.
  if [ -n "$running" ]; then { kill -KILL "$running" && wait "$running"; } 2>/dev/null || true; fi
  rm -rf "$scratch" || { sleep 1 && rm -rf "$scratch"; }
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

in_cluster=()
for part in "$@"; do [ "$part" = wheelhouse ] || in_cluster+=("$part"); done
case " $* " in
  *' slurm '*)
    if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
      { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
        >"$scratch/apt.txt" 2>&1 || true # the part that needs them says so
    fi
    ;;
esac
# A background job can be waited for and ended by a signal. It has its own process numbers, /etc/hosts, /run/netns and ports,
# whatever else runs on the machine: two of these scripts can run at once.
status=0
if [ ${#in_cluster[@]} -gt 0 ]; then
  setpriv --pdeathsig KILL "${own[@]}" --net bash tests/cluster/cases.sh "$scratch" "${in_cluster[@]}" &
  running=$!
  wait $running || status=$?
  running=''
fi
case " $* " in
  *' wheelhouse '*)
    TMPDIR=$scratch setpriv --pdeathsig KILL "${own[@]}" bash tests/cluster/wheelhouse.sh &
    running=$!
    wait $running || status=$?
    running=''
    ;;
esac
exit $status
