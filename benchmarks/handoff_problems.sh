#!/usr/bin/env bash
# Which students hand off, on the built-in problems: students, then maps and what is answered through them. What is there when the
# time ends is reported, of seeds that all arms have, and the same command goes on.
#   bash benchmarks/handoff_problems.sh --to DIR [--minutes M] [--workers N] [--devices cpu|0,1] [--quick]
# --minutes: for all of it; --workers: students at a time (default: one a core, less one); --devices: cpu (default) or GPUs that the
# students are dealt out to: models so small are as fast on a core, of which there are more. A student takes 1.5 to 2.5 minutes of a
# core, judging it one. --quick: two arms, a few steps each, on a CPU, which shows that it all goes through and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

to='' minutes=600 cores=$(nproc) devices=cpu quick=()
workers=$((cores > 2 ? cores - 1 : 1))
while [ $# -gt 0 ]; do
  case $1 in
    --to) to=$2 && shift 2 ;;
    --minutes) minutes=$2 && shift 2 ;;
    --workers) workers=$2 && shift 2 ;;
    --devices) devices=$2 && shift 2 ;;
    --quick) quick=(--only structured task_only --seeds 0 --set max_steps=2 synthetic_problems=200 eval_subset_size=4) && shift ;;
    *) echo "handoff_problems: $1: expected --to, --minutes, --workers, --devices or --quick (head -8 ${BASH_SOURCE[0]})" >&2 && exit 2 ;;
  esac
done
[ -n "$to" ] || { echo "handoff_problems: no --to DIR (head -8 ${BASH_SOURCE[0]})" >&2; exit 2; }
[ "$devices" != cpu ] || export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu
export OMP_NUM_THREADS=1

# Of the time 7 parts in 10 for training, the last minute for students whose judging has begun.
python -m kvds.cli ab launch/recipes/experiments/handoff_problems.yaml --in_process --keep student --workers "$workers" \
  --devices "$devices" --max_minutes "$(python -c "print(0.7 * $minutes)")" "${quick[@]}" --output "$to" ||
  echo "handoff_problems: kvds ab ended with $?; what is there is judged"
left=$(python -c "print(max(0.1, $minutes - 1 - $SECONDS / 60))")
python -m benchmarks.handoff.evidence "$to/handoff_problems" --workers "$workers" --minutes "$left" \
  --held_out "$([ ${#quick[@]} = 0 ] && echo 200 || echo 8)" --output "$to/handoff_problems.csv"
