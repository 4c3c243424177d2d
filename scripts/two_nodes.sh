#!/usr/bin/env bash
# What two hosts with a real network between them are to show, in one go of a few minutes: the same
# command on each, with its number at the end.
#
#   bash scripts/two_nodes.sh FIRST_HOST 0        on the first
#   bash scripts/two_nodes.sh FIRST_HOST 1        on the second
#   NODES=4 bash scripts/two_nodes.sh ...         more hosts: numbers 0 to 3
#
# FIRST_HOST is a name or address of host 0 that all can reach. Under SLURM one command does for all:
#
#   srun --nodes=2 --ntasks-per-node=1 bash scripts/two_nodes.sh
#
# Steps: what each host has; messages on every rail, checked and timed; operations and backwards bit by
# bit against an oracle; figures. The first that fails ends it. NVSHMEM_* variables count as in a job
# (docs/network.md). Everything is in OUT (default: runs/two-nodes). PROCESSES of each host (default:
# its GPUs), PORT (default: 29511; under SLURM of job and step), CASES (default: 20).
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -e .venv/bin/activate ] || source .venv/bin/activate

if [ -n "${SLURM_STEP_NODELIST:-}" ] && [ $# = 0 ]; then
    first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    set -- "$first" "$SLURM_NODEID"
    NODES=$SLURM_STEP_NUM_NODES
    # As ep_comm/job/ranks.py: each step of each job has ports of its own.
    PORT=${PORT:-$((20000 + (SLURM_JOB_ID + 3571 * SLURM_STEP_ID) % 10000))}
fi
if [ $# != 2 ]; then
    echo "error: bash scripts/two_nodes.sh FIRST_HOST NUMBER (0 on FIRST_HOST, 1 on the second)" >&2
    exit 2
fi
host=$1 number=$2
nodes=${NODES:-2} port=${PORT:-29511} out=${OUT:-runs/two-nodes} cases=${CASES:-20}
backend=${BACKEND:-nodes} # reference: over NCCL or gloo, to try the script out
processes=${PROCESSES:-$(python3 -c 'import torch; print(torch.cuda.device_count())')}
if [ "$processes" = 0 ]; then
    echo "error: torch sees no GPU on host $number (ep-comm doctor says more)" >&2
    exit 2
fi
mkdir -p "$out"
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

everywhere() { # NAME COMMAND...: on all hosts at once, this one's output also in a file
    local name=$1
    shift
    echo "== $name"
    # srun's variables describe its own tasks, one a host; the processes are torchrun's.
    env -u SLURM_STEP_TASKS_PER_NODE timeout 900 python3 -m torch.distributed.run \
        --nnodes="$nodes" --node-rank="$number" --nproc-per-node="$processes" \
        --master-addr="$host" --master-port="$port" "$@" 2>&1 | tee "$out/$name-$number.txt"
    port=$((port + 1))
}

echo "== what host $number has"
python3 -m ep_comm.cli doctor | tee "$out/doctor-$number.txt"
everywhere messages -m ep_comm.cli doctor --network --backend "$backend"
everywhere operations scripts/nodes_check.py --cases "$cases" --backend "$backend"
if [ "$backend" = nodes ]; then
    everywhere bench-w1 scripts/hosts_bench.py --shape W1
    everywhere bench-w1-24-sms scripts/hosts_bench.py --shape W1 --sms 24
    everywhere bench-w1-groups scripts/hosts_bench.py --shape W1 --num-groups 8 --topk-groups 4
    everywhere bench-w2 scripts/hosts_bench.py --shape W2
else
    everywhere bench scripts/hosts_bench.py --shape W2 --tokens 16 --iters 20
fi
echo "== host $number: all of it passed; it is in $out"
