#!/usr/bin/env bash
# Creates an environment if there is none, then runs the tests, a file at a time on every core.
# Arguments go to pytest (e.g. -m slow).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
cd "$ROOT"
# One thread for each worker: threads of several would wait for each other.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$PYTHON" -m pytest -n auto --dist loadfile "$@"
