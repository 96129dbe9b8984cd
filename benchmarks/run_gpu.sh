#!/usr/bin/env bash
# What is measured on GPUs, stage by stage, without the network.
#   bash benchmarks/run_gpu.sh [--data DIR] [--to DIR] [--wheels DIR] STAGE...
# Stages, each with its own time limit:
#   tests      pytest -m gpu                                                     4 min
#   sanitizer  compute-sanitizer on a small case of every kernel                 4 min
#   ops        bench_map_projection.py in full                                   9 min
#   head       bench_head.py: the losses at the language-model head              1 min
#   ncu        what bounds the fused kernel, by its hardware counters            2 min
#   step       benchmarks.train_step.bench --pair qwen2, beside the earlier way; TRL at  9 min
#              16 rows, as many as leave room for its whole logits
#   forms      benchmarks.train_step.forms: padded, in one row, compiled, under ZeRO  8 min
#   losses     the best form with other losses: task, logits, both, a teacher on disk        4 min
#   trl        TRL's GKDTrainer at 8 to 64 rows: which is its best                5 min
#   layers     bench_layer_gathering.py: what ZeRO's stages cost the host        5 min
#   scaling    bench_scaling.py on 1, 2, … GPUs, every placement                 9 min
#   stages     bench_scaling.py, 256 rows per GPU, ZeRO-3, 0, 1 and 2            9 min
#   handoff    benchmarks.handoff.bench: time to first token and memory of a handoff, 512 to 32768 tokens   3 min
#   handoff_evidence  benchmarks/handoff_problems.sh: which students hand off, on the host's cores; again to go on   9 min
#   handoff_pretrained  benchmarks/handoff_pretrained.sh: the same of the pretrained pair in $KVDS_PAIR; again to go on   9 min
#   gsm8k_large  A/B at 72 M → 15 M parameters on GSM8K, spread over all GPUs    9 min
#   pretrained benchmarks/pretrained.sh: the pretrained pair in $KVDS_PAIR (default    9 min
#              outputs/pretrained_pair, launch/pretrained_pair.sh makes it)
# --data: the folder with gsm8k/, tokenizers/ and models/ (default ../shared/data); --to: where results go (default
# benchmarks/results); --wheels: a folder of wheels to use beside the machine's own torch (made by launch/wheelhouse.sh).
# A stage that fails does not stop the next; the exit code says whether any did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=../shared/data to=benchmarks/results wheels='' stages=()
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2 && shift 2 ;;
    --to) to=$2 && shift 2 ;;
    --wheels) wheels=$2 && shift 2 ;;
    tests | sanitizer | ops | head | ncu | step | forms | losses | trl | layers | scaling | stages | gsm8k_large | pretrained | handoff | handoff_evidence | handoff_pretrained) stages+=("$1") && shift ;;
    *) echo "run_gpu: $1: expected --data, --to, --wheels or a stage (head -31 ${BASH_SOURCE[0]})" >&2 && exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || { echo "run_gpu: no stage given (head -31 ${BASH_SOURCE[0]})" >&2; exit 2; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "run_gpu: torch sees no GPU" >&2; exit 2; }
mkdir -p "$to"

if [ -n "$wheels" ]; then
  site=${KVDS_SITE:-/tmp/kvds-site}
  [ -d "$site" ] || python -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
counts=1
for ((n = 2; n <= gpus; n *= 2)); do counts+=" $n"; done

run_stage() {
  case $1 in
    tests) timeout 240 python -m pytest $(grep -rl mark.gpu tests --include=test_*.py) -m gpu -q -p no:cacheprovider ;;
    sanitizer)
      # Without the caching allocator each tensor is an allocation of its own: a byte beyond it is seen.
      for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 80 compute-sanitizer --tool $tool --error-exitcode 86 \
          --target-processes all python -m benchmarks.map_projection.smallest_kernels --pair small_128 --tokens 1500 || return
      done ;;
    ops) timeout 540 python -m benchmarks.map_projection.bench --minutes 7.5 --output "$to/map_projection_$(name).csv" ;;
    head) timeout 60 python -m benchmarks.bench_head --output "$to/head_$(name).csv" ;;
    ncu)
      timeout 120 ncu --clock-control none --kernel-name map_projection_kernel --launch-count 2 --set full \
        python -m benchmarks.map_projection.smallest_kernels --pair qwen2 --tokens 32768 ;;
    step)
      # shellcheck disable=SC2046
      CUDA_VISIBLE_DEVICES=0 timeout 400 python -m benchmarks.train_step.bench --pair qwen2 --batch_size 32 --rounds 12 --minutes 5 \
        --data_dir "$data" --output_dir "$to" --arms $(arms) &&
        CUDA_VISIBLE_DEVICES=0 timeout 140 python -m benchmarks.train_step.bench --pair qwen2 --batch_size 16 --rounds 8 --minutes 1 \
          --data_dir "$data" --output_dir "$to" --name "train_step_qwen2_$(name)_batch16" \
          --arms task_only teacher_forward kvds_structured kvds_structured_values kvds_logit_kd trl_gkd ;;
    forms) timeout 480 python -m benchmarks.train_step.forms --data_dir "$data" --output "$to/step_forms_qwen2_$(name).csv" ;;
    losses)
      timeout 240 python -m benchmarks.train_step.forms --rows 128 --zero_forms --minutes 3.5 --data_dir "$data" \
        --forms "one row, compiled" "one row, compiled; task" "one row, compiled; kv from disk" \
        "one row, compiled; logits" "one row, compiled; kv and logits" --output "$to/step_losses_qwen2_$(name).csv" ;;
    trl)
      for rows in 8 16 32 64; do
        timeout 75 python -m benchmarks.train_step.bench --pair qwen2 --batch_size $rows --rounds 8 --minutes 0.6 \
          --data_dir "$data" --output_dir "$to" --name "train_step_trl_$(name)_$rows" --arms kvds_logit_kd trl_gkd
      done ;;
    layers) timeout 300 python -m benchmarks.bench_layer_gathering --turns 1 --output "$to/layer_gathering_$(name).csv" ;;
    scaling)
      # shellcheck disable=SC2086
      timeout 540 python -m benchmarks.bench_scaling --data_dir "$data" --gpus $counts --minutes 7 --output_dir "$to" ;;
    stages)
      # shellcheck disable=SC2086
      timeout 560 python -m benchmarks.bench_scaling --data_dir "$data" --gpus $counts --questions weak --batch_size 256 \
        --steps 8 --placements replicated --pad_to_multiple_of 64 --stages zero2 zero0 zero1 --minutes 8 \
        --name "scaling_stages_$(name)" --output_dir "$to" ;;
    handoff) timeout 180 python -m benchmarks.handoff.bench --output "$to/handoff_$(name).csv" ;;
    handoff_evidence) timeout 560 bash benchmarks/handoff_problems.sh --to "$to/handoff" --minutes 8.5 ;;
    handoff_pretrained)
      timeout 570 bash benchmarks/handoff_pretrained.sh --data "$data" --to "$to/handoff" --pair "${KVDS_PAIR:-outputs/pretrained_pair}" \
        --minutes 9 --workers $((3 * gpus)) --devices "$(seq -s, 0 $((gpus - 1)))" ;;
    gsm8k_large)
      timeout 540 python -m kvds.cli ab launch/recipes/experiments/gsm8k_large.yaml --set data_dir="$data" \
        --devices "$(seq -s, 0 $((gpus - 1)))" --workers $((2 * gpus)) --in_process --max_minutes 8 --output "$to/ab" ;;
    pretrained)
      timeout 540 bash benchmarks/pretrained.sh --data "$data" --to "$to/pretrained" --pair "${KVDS_PAIR:-outputs/pretrained_pair}" \
        --minutes 8 --workers 3 ;;
  esac
}

arms() { python -c 'from benchmarks.train_step.arms import ARMS; print(*ARMS)'; }
name() { python -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())'; }

failed=0
for stage in "${stages[@]}"; do
  begun=$SECONDS status=0
  echo "== $stage"
  run_stage "$stage" 2>&1 | tee "$to/run_gpu_$stage.log"
  status=${PIPESTATUS[0]}
  echo "== $stage: $((SECONDS - begun)) s, exit code $status"
  [ "$status" = 0 ] || failed=1
done
exit "$failed"
