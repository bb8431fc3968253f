#!/usr/bin/env bash
# Checks format and lint. The pre-commit hook and CI call it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
cd "$ROOT"
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
