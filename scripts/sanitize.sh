#!/usr/bin/env bash
# Run the small cases of tests/test_virtual_ranks.py under compute-sanitizer's memcheck and racecheck, each in
# a process of its own, side by side: two minutes on one GPU. (synccheck calls every barrier of a part of a
# block an error.)
#   bash scripts/sanitize.sh [OUT]      summaries on the screen, the tools' output in OUT (default: runs/sanitize)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/sanitize}
mkdir -p "$out"
python3 setup.py --quiet build_ext --inplace
runs=()
for case in one-rank expert-major rank-major fp8 capacity; do
    for tool in memcheck racecheck; do
        compute-sanitizer --target-processes all --tool $tool --print-limit 10 --error-exitcode 1 \
            python3 -m pytest -q "tests/test_virtual_ranks.py::test_small_cases[$case]" \
            >"$out/$case-$tool.txt" 2>&1 &
        runs+=("$case-$tool:$!")
    done
done
failed=0
for run in "${runs[@]}"; do
    log=$out/${run%:*}.txt outcome=passed
    if ! wait "${run#*:}" || ! grep -q " passed" "$log"; then # a skipped case is none
        outcome="FAILED, see $log" failed=1
    fi
    echo "${run%:*}: $outcome; $(grep SUMMARY "$log" | tail -1)"
done
exit $failed
