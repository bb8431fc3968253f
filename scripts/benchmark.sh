#!/usr/bin/env bash
# Measures speed and memory beside the official recipe, PEFT and LoRA (docs/performance.md). Arguments go to the program:
#
#   bash scripts/benchmark.sh                  # this machine's CPU, under 15 minutes on 2 cores
#   bash scripts/benchmark.sh --device cuda    # one GPU with 40 GB or more, under 5 minutes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
cd "$ROOT"
exec "$PYTHON" -m benchmarks "$@"
