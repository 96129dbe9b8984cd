# Sourced by cases.sh: the sbatch files of launch/slurm on a cluster of two nodes.

for program in slurmctld slurmd munged; do
  command -v $program >/dev/null || skip "$program is missing and apt could not bring it ($(tail -n 1 "$scratch/apt.txt"))"
done
source tests/cluster/slurm.sh
trap stop_slurm EXIT
start_slurm "$scratch/slurm" || fail 'the cluster did not start'
export KVDS_INTERFACE=lo
begun=$SECONDS
small=(--parsable --gres=none --cpus-per-task=1)

# Submits NAME FILE [sbatch options] -- [flags]; sets job.
submit() {
  local name=$1 file=$2 options=()
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  job=$(sbatch "${small[@]}" --output="$scratch/$name.log" "${options[@]}" "launch/slurm/$file" \
    $recipe --output_dir "$scratch/$name" "${@:2}")
}

# Slurm counts limits in minutes. The ranks are stopped at a step of the first attempt, so that none of them is spent computing, and
# other cases run meanwhile. Slurm lets them go on when it sends USR1. The second attempt gets the time that it needs.
submit limited node.sbatch --time=3 --signal=USR1@90 -- --save_steps 0
limited=$job
wait_until 120 trained limited || fail 'node.sbatch: the run did not begin'
scancel --signal=STOP "$limited"
(wait_until 200 grep -q 'queued again' "$scratch/limited.log" && scontrol update jobid="$limited" timelimit=30) &
queued_again=$!

mkdir "$scratch/hub"
echo "export HF_HOME=$scratch/hub" >"$scratch/hub/env.sh"
KVDS_STAGE=1 KVDS_PREFETCHED=$scratch/hub SLURM_TMPDIR=$scratch/disk submit requeued rank.sbatch --ntasks-per-node=1 --
wait_until 120 saved requeued || fail 'rank.sbatch: the run did not begin'
scontrol requeue "$job"
wait_for_job "$job" 240 || fail 'scontrol requeue: the run did not end well'
grep -q 'resumed from step' "$scratch/requeued.log" || fail 'scontrol requeue: the second attempt did not resume'
python tests/cluster/compare.py "$scratch/requeued" "$reference" || fail 'scontrol requeue: another result'
grep -q "$scratch/hub is on the disks of 2 nodes" "$scratch/requeued.log" || fail 'KVDS_STAGE: not copied'
[ -z "$(find "$scratch/disk" -name 'hub-*')" ] || fail 'KVDS_STAGE: left behind'
pass 'rank.sbatch, one rank per task under plain srun, and scontrol requeue: resumed, ended as on one host'

array=$(KVDS_AB_DIR=$scratch/ab sbatch "${small[@]}" --array=0-3 --output="$scratch/ab-%a.log" \
  launch/slurm/ab_array.sbatch $recipe --batch_size 8)
# As in the file's head, but from this checkout.
job=$(sbatch "${small[@]}" --output="$scratch/report.log" --dependency="afterok:$array" \
  --wrap "python -m kvds.cli report $scratch/ab/* --output $scratch/ab_report")
wait_for_job "$job" 300 || fail 'ab_array.sbatch, or the report of its runs'
for run in flat-0 flat-1 structured-0 structured-1; do
  grep -q "$run" "$scratch/ab_report/report.csv" || fail "the report lacks $run"
done
# 8 rows on one rank are the 2 × 4 rows of the reference, summed in another order.
python tests/cluster/compare.py "$scratch/ab/structured-0" "$reference" --close || fail 'ab_array.sbatch: another result'
pass 'ab_array.sbatch: an array of four runs, one report when all have ended'

wait "$queued_again" || fail 'time limit: not saved and queued again'
wait_for_job "$limited" 240 || fail 'time limit: the second attempt did not end well'
grep -q 'stopping: SIGUSR1 arrived' "$scratch/limited.log" || fail 'time limit: it was not USR1 that ended the first attempt'
grep -q 'resumed from step' "$scratch/limited.log" || fail 'time limit: the second attempt did not resume'
python tests/cluster/compare.py "$scratch/limited" "$reference" || fail 'time limit: another result'
pass 'node.sbatch, one launcher per node, and a time limit: USR1, saved, queued again, resumed, ended as on one host'
