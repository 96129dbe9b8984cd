#!/usr/bin/env bash
# Qwen2-1.5B into Qwen2-0.5B on one GPU, under ZeRO-3. Any recipe and any flag may follow.
#   bash launch/one_gpu.sh [RECIPE] [--flag value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=${1:-launch/recipes/qwen2_zero3_1gpu.yaml}
# The ranks save and end on USR1 by themselves; the launcher, which would die of it, is told not to listen.
trap '' USR1
exec deepspeed --quiet --num_accelerators 1 launch/distill.py --config "$recipe" "${@:2}"
