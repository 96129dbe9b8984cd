#!/usr/bin/env bash
# Sets everything up, then distils three students from the shipped teacher on the built-in problems under ZeRO-3 on two
# ranks (task loss alone, flat, structured) and compares them: a table, a picture, the MLflow records.
#   bash launch/quickstart.sh [OUTPUT_DIR]        (default: outputs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

output=${1:-outputs/quickstart}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ranks=2
config=ds_configs/zero3_cpu.json
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  ranks=$(python -c 'import torch; print(min(2, torch.cuda.device_count()))')
  config=ds_configs/zero3_fp32.json
fi

begun=$SECONDS
for arm in task_only flat structured; do
  mode=$arm
  [ "$arm" = task_only ] && mode=none
  printf '\n== %s ==\n' "$arm"
  deepspeed --num_accelerators "$ranks" launch/distill.py --config launch/recipes/quickstart.yaml \
    --deepspeed_config "$config" --alignment_mode "$mode" --batch_size $((16 / ranks)) \
    --resume never --tracking_uri "sqlite:///$PWD/$output/mlflow.db" --run_name "$arm" --output_dir "$output/$arm"
done

printf '\n'
python -m kvds.cli report "$output"/{task_only,flat,structured} --output "$output"
printf '\nThree students in %d seconds. The loss curves: %s\n' $((SECONDS - begun)) "$output/loss_curves.png"
printf 'Look through the records: mlflow ui --backend-store-uri sqlite:///%s/mlflow.db --host 127.0.0.1\n' "$PWD/$output"
