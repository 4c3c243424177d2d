#!/usr/bin/env bash
# Set up .venv and run every test that this machine can run. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh megatron,wandb,test
export OMP_NUM_THREADS=1 # several processes share the cores
python -m ruff check .
exec python -m pytest "$@"
