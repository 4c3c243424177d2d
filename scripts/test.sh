#!/usr/bin/env bash
# Set up .venv and run every test that this machine can run, except full matrices (-m e2e). Further
# arguments go to pytest. Root in a Debian container gets SLURM's packages too, where they are
# missing; its tests skip without them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh megatron,wandb,test
scripts/slurm/local_cluster.sh install || echo "== so the tests with a real SLURM are skipped"
export OMP_NUM_THREADS=1 # several processes share the cores
bash scripts/lint.sh
exec python -m pytest "$@"
