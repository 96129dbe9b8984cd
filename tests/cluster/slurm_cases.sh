# Sourced by run.sh: the sbatch files of launch/slurm on a cluster of two nodes.

for program in slurmctld slurmd munged; do
  command -v $program >/dev/null || skip "$program is missing and apt could not bring it ($(tail -n 1 "$scratch/apt.txt"))"
done
source tests/cluster/slurm.sh
start_slurm "$scratch/slurm" || fail 'the cluster did not start'
trap stop_slurm EXIT
export KVDS_INTERFACE=lo
begun=$SECONDS

# Submits NAME FILE [sbatch options] -- [flags]; sets job.
submit() {
  local name=$1 file=$2 options=()
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  job=$(sbatch --parsable --gres=none --cpus-per-task=1 --output="$scratch/$name.log" "${options[@]}" "launch/slurm/$file" \
    $recipe --output_dir "$scratch/$name" "${@:2}")
}

submit node node.sbatch --
wait_for_job "$job" 300 || fail node.sbatch
python tests/cluster/compare.py "$scratch/node" "$scratch/host" 12 || fail 'node.sbatch: another result than on one host'
pass 'node.sbatch: one launcher per node, the result of one host'

submit rank rank.sbatch --ntasks-per-node=1 --
wait_for_job "$job" 300 || fail rank.sbatch
python tests/cluster/compare.py "$scratch/rank" "$scratch/host" 12 || fail 'rank.sbatch: another result than on one host'
pass 'rank.sbatch: one rank per task under plain srun, the result of one host'

submit requeued rank.sbatch --ntasks-per-node=1 -- --max_steps $long --save_steps 4
wait_for_step "$scratch/requeued" 300 || fail 'requeue: the run did not begin'
scontrol requeue "$job"
wait_for_job "$job" 400 || fail 'requeue: the run did not end'
grep -q 'resumed from step' "$scratch/requeued.log" || fail 'requeue: the second attempt did not resume'
python tests/cluster/compare.py "$scratch/requeued" "$scratch/host-long" $long || fail 'requeue: another result'
pass 'scontrol requeue: resumed, ended equal'

if [ -f kvds/preemption.py ]; then
  # Two minutes of time, USR1 one minute before the end (Slurm counts in minutes); the run takes longer than the first.
  submit limited node.sbatch --time=2 --signal=USR1@60 -- --max_steps 1000000 --save_steps 0
  for ((i = 0; i < 400; i++)); do
    grep -q 'queued again' "$scratch/limited.log" 2>/dev/null && grep -q 'resumed from step' "$scratch/limited.log" && break
    sleep 1
  done
  grep -q 'queued again' "$scratch/limited.log" || fail 'time limit: not queued again'
  grep -q 'resumed from step' "$scratch/limited.log" || fail 'time limit: the second attempt did not resume'
  scancel "$job"
  wait_for_job "$job" 60 || fail 'time limit: the job did not end'
  # The end that a limit leads to is compared where the run is short: USR1 as the limit sends it, by hand.
  submit signalled node.sbatch -- --max_steps $long --save_steps 0
  for ((i = 0; i < 1500; i++)); do
    [ -f "$scratch/signalled/metrics.jsonl" ] && [ "$(wc -l <"$scratch/signalled/metrics.jsonl")" -gt 5 ] && break
    sleep 0.2
  done
  scancel --signal=USR1 "$job"
  wait_for_job "$job" 400 || fail 'USR1: the run did not end'
  grep -q 'queued again' "$scratch/signalled.log" || fail 'USR1: not queued again'
  python tests/cluster/compare.py "$scratch/signalled" "$scratch/host-long" $long || fail 'USR1: another result'
  pass 'time limit: USR1, saved, queued again, resumed, ended equal'
else
  echo 'this checkout answers no USR1 (kvds/preemption.py is missing): a stand-in for the first attempt does'
  mkdir -p "$scratch/bin"
  cat >"$scratch/bin/python" <<STAND_IN
#!$(command -v python)
import os, signal, sys, time
if "SLURM_STEP_NUM_TASKS" not in os.environ or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    os.execv("$(command -v python)", ["python", *sys.argv[1:]])
signal.signal(signal.SIGUSR1, lambda *_: (print("saved", flush=True), os._exit(85)))
time.sleep(600)
STAND_IN
  chmod +x "$scratch/bin/python"
  PATH=$scratch/bin:$PATH submit limited rank.sbatch --ntasks-per-node=1 --time=2 --signal=USR1@60 --
  for ((i = 0; i < 150; i++)); do
    grep -q 'queued again' "$scratch/limited.log" 2>/dev/null && break
    sleep 1
  done
  scontrol update jobid="$job" timelimit=60
  wait_for_job "$job" 600 || fail 'time limit: the job did not end'
  [ "$(grep -c '^saved' "$scratch/limited.log")" -eq 2 ] || fail 'time limit: USR1 did not reach each rank'
  python tests/cluster/compare.py "$scratch/limited" "$scratch/host" 12 || fail 'time limit: another result'
  pass 'time limit: USR1 to each rank, 85, queued again, ended equal'
fi

job=$(KVDS_AB_DIR=$scratch/ab sbatch --parsable --gres=none --cpus-per-task=1 --array=0-3 --output="$scratch/ab-%a.log" \
  launch/slurm/ab_array.sbatch $recipe --batch_size 8)
wait_for_job "$job" 600 || fail ab_array.sbatch
python -m kvds.cli report "$scratch"/ab/* --output "$scratch/ab_report" >"$scratch/report.log" 2>&1 || fail 'report of the array'
for run in flat-0 flat-1 structured-0 structured-1; do
  grep -q "$run" "$scratch/report.log" || fail "the report lacks $run"
done
# 8 rows on one rank are the 2 × 4 rows of the reference: the same arm and seed has the same losses.
python tests/cluster/compare.py "$scratch/ab/structured-0" "$scratch/host" 12 || fail 'array: another result'
pass 'ab_array.sbatch: four runs, one report'
