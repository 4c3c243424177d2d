#!/usr/bin/env bash
# Set up .venv, then pretrain a tiny mixture of experts on two processes, through ep_comm and
# through Megatron's own alltoall, and compare. Takes two CPU cores and a few minutes; uses two
# GPUs if there are two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh megatron,wandb,cli

if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -lt 2 ]; then
    export CUDA_VISIBLE_DEVICES=
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun sets the same, but complains about it
export WANDB_MODE=${WANDB_MODE:-offline}

rm -rf runs/quickstart # of an earlier quickstart: the trainings are to be seen
echo "== training configs/tiny-cpu.yaml on 2 processes with alltoall and with ep_comm, and comparing"
ep-comm compare --config configs/tiny-cpu.yaml --variants alltoall,ep_comm \
    --out runs/quickstart --wandb-project ep_comm-quickstart --save-interval 60
echo "== ep-comm, torchrun and wandb are in .venv: source .venv/bin/activate"
