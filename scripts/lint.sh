#!/usr/bin/env bash
# Check style, types and imports of all sources: seconds, and what CI checks first. With --fix, sources
# are put into shape before that.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
mapfile -t cuda < <(git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'ep_comm/_native/*.h')
if [ "${1:-}" = --fix ]; then
    ruff check --quiet --fix . || true
    ruff format --quiet .
    clang-format -i "${cuda[@]}"
fi
ruff check --quiet .
ruff format --quiet --check . || { echo "not formatted: run scripts/lint.sh --fix" >&2 && exit 1; }
clang-format --dry-run --Werror "${cuda[@]}"
lint-imports >/dev/null || lint-imports # says where, if it fails
mypy --no-error-summary
