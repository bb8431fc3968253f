#!/usr/bin/env bash
# Pre-trains the bundled chatglm-nano again, on one GPU or on a CPU, from folders of text that
# scripts/pretraining/README.md documents:
#
#   CORPUS=/path/to/corpus FEWCLUE=/path/to/fewclue bash scripts/pretrain_nano.sh
#   CORPUS=/path/to/corpus bash scripts/pretrain_nano.sh --seconds 600     # each stage for ten minutes
#
# Two stages: rows of 256 tokens, then rows of 1,024. A run that was killed resumes when the command is given again.
# The model is in output/chatglm-nano/long/model. Flags of `python -m pretraining.train` may follow; they apply to both
# stages.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
export PYTHONPATH="$ROOT/scripts:$PYTHONPATH"
OUTPUT="${OUTPUT:-$CHATGLM_PTUNING_OUTPUT/chatglm-nano}"
TOKENS="${TOKENS:-780000000}"
LONG_TOKENS="${LONG_TOKENS:-6000000}"

pretrain() {
    # CORPUS may name several folders, separated by spaces.
    # shellcheck disable=SC2086
    "$PYTHON" -m pretraining.train --corpus ${CORPUS:?set CORPUS to the folder of text} ${FEWCLUE:+--fewclue "$FEWCLUE"} "$@"
}

pretrain --output "$OUTPUT/short" --tokens "$TOKENS" "$@"
pretrain --output "$OUTPUT/long" --initial_model "$OUTPUT/short/model" --tokens "$LONG_TOKENS" --row_length 1024 \
    --batch 16 --micro_batch 4 --echo_share 0.15 --matrix_lr 3e-3 --other_lr 1e-3 --warmup 20 --decay_share 0.95 \
    --seed 2 "$@"
