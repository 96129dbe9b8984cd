#!/usr/bin/env bash
# The run of launch/one_node.sh started by `accelerate launch`. GPUS: processes (default: all GPUs). kvds brings its own ZeRO-3, so
# that accelerate only starts the ranks; what its own configuration file would say of them is said here.
#   GPUS=8 bash launch/accelerate.sh [RECIPE] [--flag value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=${1:-launch/recipes/qwen2_zero3_8gpu.yaml}
gpus=${GPUS:-$(nvidia-smi -L | grep -c '^GPU')}
several=()
if [ "$gpus" -gt 1 ]; then several=(--multi_gpu); fi
trap '' USR1
exec accelerate launch "${several[@]}" --num_machines 1 --num_processes "$gpus" --mixed_precision no --dynamo_backend no \
  --module kvds distill --config "$recipe" "${@:2}"
