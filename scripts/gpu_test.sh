#!/usr/bin/env bash
# Build the CUDA library for this machine's GPUs and run every test that needs one, in one launch.
# Tests that need more GPUs than there are skip, and say so. Further arguments go to pytest:
#
#   bash scripts/gpu_test.sh -m multi_gpu --share-gpu 2    what needs two, on one; results, no times
set -euo pipefail
cd "$(dirname "$0")/.."
python3 setup.py --quiet build_ext --inplace
exec python3 -m pytest -m "gpu or multi_gpu" -ra "$@"
