#!/usr/bin/env bash
# Which students of a pretrained teacher hand off: rows whose answer stands in the prompt, the teacher, students, then maps and what
# is answered through them. What is there when the time ends is reported, of seeds that all arms have; the same command goes on.
#   bash benchmarks/handoff_pretrained.sh --data DATA --to DIR [--pair PAIR] [--minutes M] [--workers N] [--devices 0,1] [--quick]
# --data: the folder with gsm8k/, svamp/ and arc/; --pair: what launch/pretrained_pair.sh made (default outputs/pretrained_pair);
# --minutes: for all of it; --workers: students at a time; --devices: the GPUs that they are dealt out to (default: one). --quick: a
# toy pair and two steps a run, on a CPU, which shows that it all goes through and nothing else.
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
      echo "handoff_pretrained: $1: expected --data, --to, --pair, --minutes, --workers, --devices or --quick" >&2
      exit 2 ;;
  esac
done
[ -n "$to" ] || { echo "handoff_pretrained: no --to DIR (head -8 ${BASH_SOURCE[0]})" >&2; exit 2; }
[ -n "$data$quick" ] || { echo "handoff_pretrained: no --data DIR (head -8 ${BASH_SOURCE[0]})" >&2; exit 2; }
rows=$to/data teacher=$pair/teacher-context student=$pair/student-15 model=$pair/smollm2-135m plan=() judge=()
mkdir -p "$rows"

if [ -n "$quick" ]; then
  teacher=launch/quickstart_teacher model=launch/quickstart_teacher student=$to/pair/student
  [ -d "$student" ] || python -m kvds.cli prune --model_name "$teacher" --output "$student" --keep 0,1
  [ -f "$rows/context.jsonl" ] ||
    python -m benchmarks.handoff.context_rows --output "$rows" --datasets synthetic --synthetic_problems 16 \
      --question "how many?"
  plan=(datasets=context.jsonl max_length=96 max_new_tokens=1 eval_subset_size=4 batch_size=4 max_steps=2 calibration_batches=1)
  judge=(--corpora context.jsonl synthetic --prompts 16 --held_out 4 --steps 1 --max_length 96 --max_new_tokens 4 --batch_size 8)
fi

[ -d "$student" ] || { echo "handoff_pretrained: $student is missing (bash launch/pretrained_pair.sh $pair)" >&2; exit 2; }
if [ -z "$quick" ]; then
  for corpus in "$data"/*/; do ln -sfn "$(realpath "$corpus")" "$rows/$(basename "$corpus")"; done
  [ -f "$rows/context.jsonl" ] || python -m benchmarks.handoff.context_rows --output "$rows" --data_dir "$data"
fi
if [ ! -d "$teacher" ]; then # one epoch of the rows that it is to teach
  python -m kvds.cli distill --student_name "$model" --alignment_mode none --datasets context.jsonl svamp arc_easy \
    --data_dir "$rows" --max_length 384 --batch_size 32 --lr 2e-4 --epochs 1 --eval_subset_size 100 --max_new_tokens 1 \
    --compile off --tf32 --no_save_at_end --deepspeed_config ds_configs/zero0_fp32.json --report_to none --output_dir "$teacher.run"
  mv "$teacher.run/student" "$teacher"
fi

# Of the time that is left half for training; none of it is lost on students that are there.
left=$(python -c "print(max(0.1, ($minutes - $SECONDS / 60) / 2))")
python -m kvds.cli ab launch/recipes/experiments/handoff_pretrained.yaml --in_process --keep student --workers "$workers" \
  "${devices[@]}" --max_minutes "$left" --output "$to" --set data_dir="$rows" teacher_name="$teacher" student_name="$student" \
  tokenizer_name="$model" "${plan[@]}" || echo "handoff_pretrained: kvds ab ended with $?; what is there is judged"
left=$(python -c "print(max(0.1, $minutes - 3 - $SECONDS / 60))") # a student that has begun is judged to the end
python -m benchmarks.handoff.pretrained "$to/handoff_pretrained" --teacher "$teacher" --data_dir "$rows" --workers "$workers" \
  --minutes "$left" --output "$to/handoff_pretrained.csv" "${judge[@]}"
