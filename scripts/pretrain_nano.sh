#!/usr/bin/env bash
# Pre-trains the bundled chatglm-nano again, from two folders of public data (see data/chatglm-nano/README.md):
#
#   CORPUS=/path/to/corpus FEWCLUE=/path/to/fewclue bash scripts/pretrain_nano.sh
#
# A run that was killed goes on where it stopped. Takes about an hour and a half on two CPU cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
exec "$PYTHON" -m chatglm_ptuning.pretraining.run \
    --corpus "${CORPUS:?set CORPUS to the folder with zh_documents.jsonl.gz}" \
    --fewclue "${FEWCLUE:?set FEWCLUE to the folder with the FewCLUE tasks}" \
    --output "${OUTPUT:-$CHATGLM_PTUNING_OUTPUT/chatglm-nano}" \
    "$@"
