#!/usr/bin/env bash
# Both alignments on both model families at small size with the real tokenizers and real GSM8K text: does the whole way work?
#   bash launch/smoke.sh [DATA_DIR] [OUTPUT_DIR]   (DATA_DIR holds gsm8k/ tokenizers/ models/; default: ../shared/data)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

data=${1:-${KVDS_DATA_DIR:-../shared/data}}
output=${2:-outputs/smoke}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
[ -d "$data/gsm8k" ] || { echo "smoke: $data/gsm8k is missing; expected a folder with gsm8k/, tokenizers/ and models/" >&2; exit 2; }
mkdir -p "$output"

gpt2=(--model_name "$data/models/gpt2" --tokenizer_name "$data/tokenizers/gpt2"
  --teacher_config_overrides "n_layer=4,n_embd=128,n_head=4" --student_config_overrides "n_layer=4,n_embd=128,n_head=4")
qwen2=(--teacher_name "$data/models/qwen2-1.5b" --student_name "$data/models/qwen2-0.5b" --tokenizer_name "$data/tokenizers/qwen2"
  --teacher_config_overrides "num_hidden_layers=4,hidden_size=256,intermediate_size=512,num_attention_heads=4,num_key_value_heads=2,head_dim=64"
  --student_config_overrides "num_hidden_layers=3,hidden_size=128,intermediate_size=256,num_attention_heads=4,num_key_value_heads=2,head_dim=32")
flat=(--alignment_mode flat)
structured=(--alignment_mode structured --map_proj_share_dim --map_proj_init_uniform)

for family in gpt2 qwen2; do
  for mode in flat structured; do
    run="$output/$family-$mode"
    declare -n model=$family align=$mode
    begun=$SECONDS
    deepspeed --num_accelerators 2 launch/distill.py "${model[@]}" "${align[@]}" --teacher_init random --student_init random \
      --datasets gsm8k --data_dir "$data" --subset_size 10 --calibration_batches 1 --batch_size 2 --epochs 1 --max_length 384 --kv_method full \
      --deepspeed_config ds_configs/zero3_cpu.json --logging_steps 1 --eval_subset_size 2 --max_new_tokens 8 \
      --resume never --output_dir "$run" 2>&1 | tee "$output-$family-$mode.log"
    python launch/check_run.py "$run" "$mode" "$output-$family-$mode.log"
    echo "smoke: $family $mode in $((SECONDS - begun)) s"
  done
done
