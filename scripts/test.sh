#!/usr/bin/env bash
# Set up .venv, check the sources, and run what tests this machine can run. Further arguments go to
# pytest.
#
#   bash scripts/test.sh            one case of every kind, with trainings and a real SLURM
#   bash scripts/test.sh --quick    the library and one small training, without GPUs: two minutes
#   bash scripts/test.sh -m e2e     the full matrices
#
# Root in a Debian container gets SLURM's packages too, where they are missing (not with --quick);
# its tests skip without them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh megatron,wandb,test
export OMP_NUM_THREADS=1 # several processes share the cores
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules
bash scripts/lint.sh
if [ "${1:-}" = --quick ]; then
    shift
    set -- -m "not (e2e or slow or slurm or gpu or multi_gpu)" tests/native tests/core tests/backends \
        "tests/megatron/test_megatron.py::test_trains_like_alltoall[aux_loss]" "$@"
else
    scripts/slurm/local_cluster.sh install || echo "== so the tests with a real SLURM are skipped"
fi
# A process for each core; what a file's tests share stays in one.
exec python -m pytest -n auto --dist loadgroup "$@"
