# What every Slurm file here needs: address and port, caches on the node's own disk, no internet, and the way to be queued again.
# Sourced in the folder that sbatch was called in, the repository. Set before sbatch what your site needs:
#   KVDS_VENV        environment to activate                        (.venv, where there is one)
#   KVDS_PREFETCHED  folder that `kvds prefetch RECIPE --to` filled
#   KVDS_STAGE       1: KVDS_PREFETCHED is copied to each node's own disk first, which then is all that the ranks read
#   KVDS_INTERFACE   network interface between nodes, `ip -br addr` lists them; unset: NCCL and gloo choose

on_each_node() { # COMMAND ARGUMENT …: the arguments are $0, $1, …
  srun --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 bash -c "$@"
}

venv=${KVDS_VENV:-.venv}
# shellcheck disable=SC1091
if [ -f "$venv/bin/activate" ]; then source "$venv/bin/activate"; fi
# shellcheck disable=SC1091
if [ -n "${KVDS_PREFETCHED:-}" ]; then source "$KVDS_PREFETCHED/env.sh"; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Jobs that share a node have other numbers; below 32768 no client socket can sit on the port already.
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
if [ -n "${KVDS_INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME=$KVDS_INTERFACE GLOO_SOCKET_IFNAME=$KVDS_INTERFACE
fi
# Since Slurm 22.05 srun does not take it over from sbatch: a task would get one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# Minutes until a collective gives up on a rank that is gone.
export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-20}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} TOKENIZERS_PARALLELISM=false
# Compiled code on the node's own disk: locks on a shared one are slow, and a killed job's lock would stop all later ones.
scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/kvds-$(id -un)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$scratch/torch_extensions}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}

# A folder per job: another job's would be half there. Links of the hub's cache stay links.
staged=''
if [ -n "${KVDS_STAGE:-}" ] && [ -n "${KVDS_PREFETCHED:-}" ]; then
  staged=$scratch/hub-$SLURM_JOB_ID
  on_each_node 'mkdir -p "$1" && cp -a "$0/." "$1"' "$KVDS_PREFETCHED" "$staged"
  export HF_HOME=$staged
  echo "kvds: $KVDS_PREFETCHED is on the disks of ${SLURM_JOB_NUM_NODES:-1} nodes"
fi

# Before the time limit Slurm sends USR1 to the ranks; they save and exit with 85. The job then goes back to the queue and the next
# attempt, in the same output folder, resumes.
requeue_or_exit() {
  if [ -n "$staged" ]; then on_each_node 'rm -rf "$0"' "$staged" || true; fi
  if [ "$1" -eq 85 ]; then
    echo "kvds: saved before the time limit, queued again (attempt $((${SLURM_RESTART_COUNT:-0} + 1)) is over)"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
  exit "$1"
}
