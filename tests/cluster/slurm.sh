# A Slurm cluster of two nodes on this machine, for the length of a script that sources this file. As root, without systemd.
#   start_slurm FOLDER     (state, logs, configuration; stop_slurm at the end)

start_slurm() {
  cluster=$1
  local host memory
  host=$(hostname -s)
  memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 2048))
  mkdir -p "$cluster"/{state,spool-n1,spool-n2,munge}
  chmod 755 "$cluster"
  head -c 1024 /dev/urandom >"$cluster/munge/key"
  chmod 400 "$cluster/munge/key"
  chmod 755 "$cluster/munge"
  # The nodes' names lead to this machine, in this script's own view of /etc/hosts only.
  { cat /etc/hosts; echo '127.0.0.1 n1 n2'; } >"$cluster/hosts"
  mount --bind "$cluster/hosts" /etc/hosts
  cat >"$cluster/slurm.conf" <<CONF
ClusterName=kvds
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$cluster/munge/socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=5
SlurmdParameters=config_overrides
InactiveLimit=0
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool-%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd-%n.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd-%n.log
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17818 CPUs=64 RealMemory=$memory
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17819 CPUs=64 RealMemory=$memory
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
  export SLURM_CONF=$cluster/slurm.conf
  munged --force --key-file="$cluster/munge/key" --socket="$cluster/munge/socket" --pid-file="$cluster/munge/pid" \
    --log-file="$cluster/munge/log" --seed-file="$cluster/munge/seed"
  slurmctld
  slurmd -N n1
  slurmd -N n2
  local i
  for ((i = 0; i < 100; i++)); do
    [ "$(sinfo -h -o '%T %D' 2>/dev/null)" = 'idle 2' ] && return 0
    sleep 0.3
  done
  sinfo
  tail -n 5 -q "$cluster"/*.log
  return 1
}

stop_slurm() {
  local pid
  scancel --user=root 2>/dev/null || true
  for pid in "$cluster"/slurmd-n1.pid "$cluster"/slurmd-n2.pid "$cluster"/slurmctld.pid "$cluster"/munge/pid; do
    [ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null
  done
  umount /etc/hosts
  return 0
}

# Waits until JOB, or each job of an array, has ended, at most SECONDS, and whether all have ended well.
wait_for_job() {
  ended() { [ -z "$(squeue -h -j "$1" -t PENDING,RUNNING,COMPLETING,REQUEUED,SUSPENDED 2>/dev/null)" ]; }
  if wait_until "$2" ended "$1" && [ "$(squeue -h -j "$1" -t all -o %T | sort -u)" = COMPLETED ]; then return 0; fi
  squeue -t all
  return 1
}
