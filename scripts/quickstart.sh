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

for dispatcher in alltoall deepep; do
    echo "== training configs/tiny-cpu.yaml on 2 processes with $dispatcher"
    torchrun --standalone --nproc_per_node=2 examples/pretrain_moe.py \
        --config configs/tiny-cpu.yaml --moe-token-dispatcher "$dispatcher" \
        --run-dir "runs/tiny-cpu-$dispatcher" --wandb-project ep_comm-quickstart
done

echo "== comparing"
python examples/plot_runs.py runs/tiny-cpu-alltoall runs/tiny-cpu-deepep \
    --out runs/quickstart.png
echo "W&B run: $(ls -d runs/tiny-cpu-deepep/wandb/*run-* | tail -n 1)"
