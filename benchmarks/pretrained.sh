#!/usr/bin/env bash
# The plans of the pretrained pair, setting by setting, the one that matters most first; what is there when the time ends is
# reported, every arm with the same seeds, and the same command goes on.
#   bash benchmarks/pretrained.sh --data DATA --to DIR [--pair PAIR] [--minutes M] [--workers N] [--devices 0,1] [--quick]
# --data: the folder with gsm8k/, svamp/, strategyqa/ and arc/; --pair: what launch/pretrained_pair.sh made, with a student of 15
# layers and, if there is one, of 20 (default outputs/pretrained_pair); --minutes: for all settings together; --workers: runs at a
# time; --devices: the GPUs that they are dealt out to (default: one). --quick: a toy pair and two steps a run, on a CPU, which
# shows that it all goes through and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data='' to='' pair=outputs/pretrained_pair minutes=600 workers=1 devices=() quick=''
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2 && shift 2 ;;
    --to) to=$2 && shift 2 ;;
    --pair) pair=$2 && shift 2 ;;
    --minutes) minutes=$2 && shift 2 ;;
    --workers) workers=$2 && shift 2 ;;
    --devices) devices=(--devices "$2") && shift 2 ;;
    --quick) quick=1 && shift ;;
    *)
      echo "pretrained: $1: expected --data, --to, --pair, --minutes, --workers, --devices or --quick (head -9 ${BASH_SOURCE[0]})" >&2
      exit 2 ;;
  esac
done
[ -n "$to" ] || { echo "pretrained: no --to DIR (head -9 ${BASH_SOURCE[0]})" >&2; exit 2; }
[ -n "$data$quick" ] || { echo "pretrained: no --data DIR (head -9 ${BASH_SOURCE[0]})" >&2; exit 2; }
plans=launch/recipes/experiments begun=$SECONDS

if [ -n "$quick" ]; then
  pair=$to/pair
  [ -d "$pair/student-15" ] || python -m kvds.cli prune --model_name launch/quickstart_teacher --output "$pair/student-15" --keep 0,1
  toy=(datasets=synthetic synthetic_problems=16 subset_size=none max_length=96 max_new_tokens=1 eval_subset_size=4 batch_size=4
    max_steps=2 calibration_batches=1 teacher_name=launch/quickstart_teacher student_name="$pair/student-15"
    tokenizer_name=launch/quickstart_teacher)
  python -m kvds.cli ab "$plans/pretrained_gsm8k.yaml" --tune --seeds 0 --in_process --set "${toy[@]}" --output "$to/toy"
  python -m kvds.cli ab "$plans/pretrained_schedules.yaml" --seeds 0 --in_process --set "${toy[@]}" --output "$to/toy"
  exit
fi

[ -d "$pair/student-15" ] || { echo "pretrained: $pair/student-15 is missing (bash launch/pretrained_pair.sh $pair)" >&2; exit 2; }
model=$pair/smollm2-135m
finetune() { # a teacher of one epoch on the rows that it is to teach; to the bit again: finished runs are known by it
  [ -d "$1" ] && return
  python -m kvds.cli distill --student_name "$model" --alignment_mode none --datasets "${@:2}" --data_dir "$data" --max_length 384 \
    --batch_size 32 --lr 2e-4 --epochs 1 --eval_subset_size 100 --max_new_tokens 1 --compile off --tf32 --deterministic --no_save_at_end \
    --deepspeed_config ds_configs/zero0_fp32.json --report_to none --output_dir "$1.run"
  mv "$1.run/student" "$1"
}

setting() { # NAME PLAN TEACHER LAYERS [KEY=VALUE…]
  local left=$((minutes - (SECONDS - begun) / 60))
  [ -d "$pair/student-$4" ] || { echo "== $1: no $pair/student-$4, left out"; return; }
  [ "$left" -gt 0 ] || { echo "== $1: no time is left"; return; }
  echo "== $1"
  local tune=--tune && [ "$2" != pretrained_schedules ] || tune=''
  # shellcheck disable=SC2086
  python -m kvds.cli ab "$plans/$2.yaml" $tune --in_process --workers "$workers" "${devices[@]}" --max_minutes "$left" \
    --output "$to/$1" --set data_dir="$data" teacher_name="$3" student_name="$pair/student-$4" tokenizer_name="$model" \
    "${@:5}" || echo "== $1: exit code $?"
}

all=(subset_size=none epochs=1)
finetune "$pair/teacher" gsm8k
setting 15_layers_1000_rows pretrained_gsm8k "$pair/teacher" 15
setting 15_layers_1000_rows pretrained_schedules "$pair/teacher" 15
setting 20_layers_1000_rows pretrained_gsm8k "$pair/teacher" 20
setting 15_layers_all_rows pretrained_gsm8k "$pair/teacher" 15 "${all[@]}"
finetune "$pair/teacher-mix" gsm8k svamp strategyqa arc_easy
setting 15_layers_1000_rows pretrained_mix "$pair/teacher-mix" 15
setting 20_layers_1000_rows pretrained_mix "$pair/teacher-mix" 20
setting 20_layers_all_rows pretrained_gsm8k "$pair/teacher" 20 "${all[@]}"
setting 15_layers_all_rows pretrained_mix "$pair/teacher-mix" 15 "${all[@]}"
setting 20_layers_all_rows pretrained_mix "$pair/teacher-mix" 20 "${all[@]}"
