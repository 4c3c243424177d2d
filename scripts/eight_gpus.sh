#!/usr/bin/env bash
# What a host with 8 GPUs is to show, in one go of some eight minutes: the NVLink kernels on 2 to 8 ranks
# bit by bit against the reference, the setting that others publish (4096 tokens, hidden 7168, top-8 of
# 256, EP8; FP8 dispatch, BF16 combine) and a small hidden size with fewer SMs, one training comparison
# (needs Transformer Engine).
#   bash scripts/eight_gpus.sh [OUT]      tables on the screen, everything in OUT (default: runs/eight-gpus)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/eight-gpus}
mkdir -p "$out"
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -lt 8 ]; then
    echo "error: needs 8 GPUs, this machine has $gpus" >&2
    exit 2
fi
python3 setup.py --quiet build_ext --inplace
run=(torchrun --nproc_per_node=8)
# Each rank on cores of its own, where torchrun finds out which.
if "${run[@]}" --numa-binding exclusive --no-python true 2>/dev/null; then
    run+=(--numa-binding exclusive)
fi
run+=(-m ep_comm.cli bench)

failed=0
bench() { # FOLDER FLAGS...
    local folder=$1
    shift
    echo "== ep-comm bench $*"
    "${run[@]}" "$@" --out "$out/$folder" || failed=1
}

timeout 240 python3 -m pytest -q -m multi_gpu tests/core/test_buffer.py -k "random or thousand" -ra || failed=1
bench uniform --preset W1 --fp8 --sms 0,24,16
bench group-limited --preset W1 --fp8 --num-groups 8 --topk-groups 4 --sms 0,24
bench small-hidden --preset W2 --fp8 --sms 0,24
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "${run[@]}" train \
    --config configs/deepseek-v3-proxy.yaml --expert-model-parallel-size 8 \
    --variants alltoall,ep_comm,ep_comm-overlap --microbatches 1 --out "$out/train" || failed=1
exit $failed
