#!/usr/bin/env bash
# A rehearsal at true width, also on a CPU. Writes a random ChatGLM3-6B with all layers in the published layout of seven
# shards (bfloat16, 12.5 GB), loads it and prints the peak memory. Then, with two layers in float32 (4 GB), trains a
# prefix for three steps, saves it, reloads it and generates. All files are deleted afterwards.
#
#   FOLDER=/path/with/13/GB/free bash scripts/rehearse.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment

MODEL=${MODEL:-chatglm3-6b}
FOLDER=$(mktemp -d -p "${FOLDER:-${TMPDIR:-/tmp}}" rehearsal-XXXXXX)
trap 'rm -rf "$FOLDER"' EXIT

stage() {
    "$PYTHON" "$ROOT/scripts/rehearsal.py" --model "$MODEL" "$@"
}

stage --stage build --folder "$FOLDER/whole" --dtype bfloat16
stage --stage load --folder "$FOLDER/whole" --dtype bfloat16
rm -rf "$FOLDER/whole"
stage --stage build --folder "$FOLDER/two-layers" --num_layers 2 --dtype float32
stage --stage train --folder "$FOLDER/two-layers" --dtype float32
