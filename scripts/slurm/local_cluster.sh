#!/usr/bin/env bash
# A real SLURM on this one machine, for trying job scripts out: slurmctld, slurmd and munged, all
# of their files in one folder, nothing in /etc, no systemd, no database.
#
#   scripts/slurm/local_cluster.sh start [FOLDER]    then: export SLURM_CONF=FOLDER/slurm.conf
#   scripts/slurm/local_cluster.sh stop [FOLDER]     ends jobs and daemons, removes FOLDER
#   scripts/slurm/local_cluster.sh install           Debian's packages, as root in a container
#
# FOLDER must be new; without one it is /tmp/ep-comm-slurm-USER. The cluster has one node, no GPUs
# and two partitions: a job in "urgent" preempts those in "batch" (the default), which are requeued.
# Any user may start it; jobs run as that user.
set -euo pipefail

readonly PACKAGES=(slurmctld slurmd slurm-client munge)
readonly PROGRAMS=(slurmctld slurmd munged sbatch srun scontrol)
PATH=$PATH:/usr/sbin:/sbin # where Debian puts the daemons

die() {
    echo "error: $*" >&2
    exit 1
}

missing_programs() {
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

install_packages() {
    [ -n "$(missing_programs)" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || [ -d /run/systemd/system ]; then
        die "not root in a Debian container: install ${PACKAGES[*]} yourself"
    fi
    echo "installing ${PACKAGES[*]}"
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # 1: starts no service
    apt_install || { timeout 60 apt-get update -qq >/dev/null 2>&1 && apt_install; } ||
        die "apt-get cannot install ${PACKAGES[*]}"
}

apt_install() {
    timeout 120 apt-get install -qq -y --no-install-recommends "${PACKAGES[@]}" >/dev/null 2>&1
}

free_port() { # from $1 on
    local port=$1
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((port + 1))
    done
    echo "$port"
}

wait_until() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

node_is_idle() {
    [ "$(sinfo --noheader --partition=batch --format=%T)" = idle ]
}

write_configuration() {
    local host user port cpus
    host=$(hostname -s) user=$(id -un) cpus=$(nproc)
    port=$(free_port $((20000 + $$ % 10000)))
    cat >"$FOLDER/slurm.conf" <<CONFIGURATION
ClusterName=ep-comm-local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$(free_port $((port + 1)))
SlurmUser=$user
SlurmdUser=$user
# A requeued job waits until its old credentials have expired: two minutes by default.
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
PlugStackConfig=$FOLDER/plugstack.conf
# Neither cgroups nor a database nor MPI.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=200000,sched_interval=2
MinJobAge=600
KillWait=60
InactiveLimit=0
ReturnToService=2
# Two tasks run at once, also where there is one core.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cpus > 2 ? cpus : 2)) State=UNKNOWN
PartitionName=batch Nodes=$host Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=$host PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
CONFIGURATION
    : >"$FOLDER/plugstack.conf"
}

start() {
    local missing
    missing=$(missing_programs)
    [ -z "$missing" ] || die "missing: ${missing//$'\n'/ }. Try: $0 install"
    mkdir -m 755 "$FOLDER" 2>/dev/null ||
        die "$FOLDER exists, or cannot be created: name another folder, or stop the cluster in it"
    trap 'stop >/dev/null' EXIT # unless everything below succeeds
    mkdir -m 755 "$FOLDER"/{munge,state,spool}
    (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge/key")
    write_configuration

    # munged distrusts folders that others may write to, /tmp among them: --force.
    munged --force --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" \
        --pid-file="$FOLDER/munge/pid" --log-file="$FOLDER/munge/log" \
        --seed-file="$FOLDER/munge/seed" 2>"$FOLDER/munge/stderr" ||
        die "munged: $(tail -n 1 "$FOLDER/munge/stderr")"
    slurmctld -f "$SLURM_CONF" -c 2>"$FOLDER/slurmctld.stderr" ||
        die "slurmctld: $(tail -n 1 "$FOLDER/slurmctld.stderr")"
    slurmd -f "$SLURM_CONF" 2>"$FOLDER/slurmd.stderr" ||
        die "slurmd: $(tail -n 1 "$FOLDER/slurmd.stderr")"
    wait_until 30 node_is_idle ||
        die "the node does not become idle: $(tail -n 3 "$FOLDER"/slurm*.log)"
    trap - EXIT
    echo "SLURM $(sinfo --version | cut -d' ' -f2) runs in $FOLDER. To use it:"
    echo "export SLURM_CONF=$SLURM_CONF"
}

ended() {
    local pid
    for pid in "$@"; do
        ! kill -0 "$pid" 2>/dev/null || return 1
    done
}

stop() {
    [ -e "$SLURM_CONF" ] || die "no cluster in $FOLDER"
    local file pids=()
    if [ -e "$FOLDER/slurmctld.pid" ]; then
        scancel --me 2>/dev/null || true
        sleep 0.5
        scancel --me --signal=KILL --full 2>/dev/null || true
        wait_until 10 no_jobs || true
    fi
    for file in "$FOLDER"/{slurmd.pid,slurmctld.pid,munge/pid}; do
        [ -s "$file" ] || continue
        pids+=("$(<"$file")")
        kill "${pids[-1]}" 2>/dev/null || true
    done
    wait_until 20 ended "${pids[@]}" || kill -KILL "${pids[@]}" 2>/dev/null || true
    rm -rf "$FOLDER"
    echo "stopped the SLURM of $FOLDER, and removed its files"
}

no_jobs() {
    [ -z "$(squeue --noheader --me)" ]
}

FOLDER=$(realpath -m "${2:-${TMPDIR:-/tmp}/ep-comm-slurm-$(id -un)}")
export SLURM_CONF=$FOLDER/slurm.conf
case ${1:-} in
start) start ;;
stop) stop ;;
install) install_packages ;;
*)
    sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
