# shellcheck shell=bash
# Sourced by the job scripts in this folder.
#
# run_requeuable STOPPED COMMAND...
#
# Runs a job step and ends the job with its exit code. If that is STOPPED, what the step exits with
# where SIGTERM stopped it before it had finished, the job goes back into the queue and keeps its
# id. A step that failed stays failed.

run_requeuable() {
    local stopped=$1 code pid interrupted stop_requested=
    shift
    # On preemption SLURM signals the tasks and this shell. Without a trap the shell would die, and
    # the job with it, while the tasks still write their checkpoint. `scancel --batch` signals this
    # shell only.
    trap 'interrupted=1 stop_requested=1; signal_tasks' TERM
    "$@" &
    pid=$!
    while :; do
        interrupted='' code=0
        wait "$pid" || code=$?
        if [ -z "$interrupted" ] || ! kill -0 "$pid" 2>/dev/null; then
            break
        fi
    done
    # Above 128: killed by a signal, maybe before it could have said STOPPED.
    if [ "$code" = "$stopped" ] || { [ -n "$stop_requested" ] && [ "$code" -gt 128 ]; }; then
        requeue
    fi
    exit "$code"
}

# RUNNING unless SLURM is ending the job: preempted, it is COMPLETING until SLURM requeues it, and so
# is a cancelled one, which must stay where it is.
job_is_running() {
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]
}

signal_tasks() {
    if job_is_running; then # else SLURM has signalled them, and scancel would try for a minute
        scancel --signal=TERM "$SLURM_JOB_ID" || true
    fi
}

requeue() {
    if ! job_is_running; then
        echo "== stopped; SLURM is ending the job, and decides whether it is started again"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "== stopped, requeued"
    else
        echo "== stopped; SLURM does not requeue it: submit it again with the same folder to go on"
    fi
}
