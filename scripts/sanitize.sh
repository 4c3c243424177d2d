#!/usr/bin/env bash
# Run the small cases of tests/backends under compute-sanitizer's memcheck and racecheck, each in a process
# of its own, side by side: two to seven minutes on one GPU. (synccheck calls every barrier of a part of a
# block an error. Under racecheck copies stand still behind a kernel of another rank: `copies` has memcheck alone.
# Its kernels use shared memory by the code of `expert-major`.)
#   bash scripts/sanitize.sh [OUT [CASE...]]   verdicts on the screen, the tools' output in OUT (runs/sanitize)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/sanitize}
cases=("${@:2}")
[ ${#cases[@]} -gt 0 ] || cases=(
    one-rank expert-major rank-major fp8 capacity copies fused split nodes nodes-rank-major
    nodes-fused nodes-split
)
command -v compute-sanitizer >/dev/null || { echo "error: needs compute-sanitizer, of the CUDA toolkit" >&2; exit 2; }
nvidia-smi -L >/dev/null 2>&1 || { echo "error: needs a GPU" >&2; exit 2; }
mkdir -p "$out"
python3 setup.py --quiet build_ext --inplace

check() {
    local case=$1 tool=$2 file=tests/backends/test_virtual_ranks.py log=$out/$1-$2.txt
    case $case in
        fused | split) file=tests/backends/test_low_latency_gpu.py ;;
        nodes-fused | nodes-split) file=tests/backends/test_virtual_nodes_low_latency.py ;;
        nodes*) file=tests/backends/test_virtual_nodes.py ;;
    esac
    if compute-sanitizer --target-processes all --tool "$tool" --print-limit 10 --error-exitcode 1 \
        python3 -m pytest -q "$file::test_small_cases[$case]" \
        >"$log" 2>&1 && grep -q " passed" "$log"; then # a skipped case is none
        echo "$case-$tool: passed; $(grep SUMMARY "$log" | tail -1)"
    else
        echo "$case-$tool: FAILED, see $log; $(grep SUMMARY "$log" | tail -1)"
        return 1
    fi
}

runs=()
for case in "${cases[@]}"; do
    for tool in memcheck racecheck; do
        [ "$case-$tool" != copies-racecheck ] || continue
        check $case $tool &
        runs+=($!)
    done
done
failed=0
for run in "${runs[@]}"; do
    wait "$run" || failed=1
done
exit $failed
