#!/usr/bin/env bash
# Creates an environment if there is none, then runs the tests. Arguments go to pytest (e.g. -m slow).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
