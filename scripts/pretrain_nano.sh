#!/usr/bin/env bash
# Pre-trains the bundled chatglm-nano again, from two folders of public data (see data/chatglm-nano/README.md):
#
#   CORPUS=/path/to/corpus FEWCLUE=/path/to/fewclue bash scripts/pretrain_nano.sh
#
# A run that was killed goes on where it stopped. Takes about two hours on two CPU cores. The model is in
# output/chatglm-nano/second/model; flags of `python -m chatglm_ptuning.pretraining.run` may follow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
OUTPUT="${OUTPUT:-$CHATGLM_PTUNING_OUTPUT/chatglm-nano}"

pretrain() {
    "$PYTHON" -m chatglm_ptuning.pretraining.run \
        --corpus "${CORPUS:?set CORPUS to the folder with zh_documents.jsonl.gz}" \
        --fewclue "${FEWCLUE:?set FEWCLUE to the folder with the FewCLUE tasks}" \
        --compile "$@"
}

pretrain --output "$OUTPUT/first" --tokens 9000000 "$@"
pretrain --output "$OUTPUT/second" --initial_model "$OUTPUT/first/model" --tokens 6000000 \
    --matrix_lr 6e-3 --other_lr 2.5e-3 --warmup 40 --decay_share 0.95 --seed 2 "$@"
