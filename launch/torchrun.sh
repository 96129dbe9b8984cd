#!/usr/bin/env bash
# The run of launch/one_node.sh started by torchrun, where that is what the site offers. GPUS: processes (default: all GPUs).
#   GPUS=8 bash launch/torchrun.sh [RECIPE] [--flag value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=${1:-launch/recipes/qwen2_zero3_8gpu.yaml}
trap '' USR1
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" launch/distill.py --config "$recipe" "${@:2}"
