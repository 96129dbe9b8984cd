#!/usr/bin/env bash
# Qwen2-1.5B into Qwen2-0.5B on the nodes of a hostfile, started from one of them by ssh. Needs pdsh, ssh without a password, and
# this folder on all nodes. The hostfile has a line `NODE slots=GPUS` for each node.
#   bash launch/hostfile.sh HOSTFILE [RECIPE] [--flag value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hostfile=${1:?usage: bash launch/hostfile.sh HOSTFILE [RECIPE] [--flag value …]}
recipe=${2:-launch/recipes/qwen2_zero3_2x8gpu.yaml}

# The launcher hands NCCL_* and PYTHON* on to the other nodes and nothing else: the rest goes through this file, which it
# looks for in the current folder. A line that is empty or has no = stops it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-20} TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/kvds-$(id -un)/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/kvds-$(id -un)/torch_extensions}
env | grep -E '^(HF_[A-Z_]*|OMP_NUM_THREADS|DEEPSPEED_TIMEOUT|TOKENIZERS_PARALLELISM|TRITON_CACHE_DIR|TORCH_EXTENSIONS_DIR|GLOO_[A-Z_]*)=.' \
  >.deepspeed_env

trap '' USR1
exec deepspeed --quiet --hostfile "$hostfile" launch/distill.py --config "$recipe" "${@:3}"
