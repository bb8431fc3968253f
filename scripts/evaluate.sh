#!/usr/bin/env bash
# Scores a prefix, or the plain base. Without settings: the prefix trained last, on the bundled headlines.
#
#   CHECKPOINT=output/my-run TEST_FILE=test.json bash scripts/evaluate.sh
#   MODEL=/path/to/chatglm3-6b CHECKPOINT=none bash scripts/evaluate.sh --compare_base --num_beams 4
#
# Any flag of `chatglm-ptuning evaluate` may follow and overrides the settings here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment

MODEL=${MODEL:-$ROOT/data/chatglm-nano}
CHECKPOINT=${CHECKPOINT:-}                     # a prefix; none: the plain base; empty: the prefix trained last
TEST_FILE=${TEST_FILE:-$ROOT/data/news_topic/dev.json}
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-128}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-128}
BATCH=${BATCH:-8}

FLAGS=()
if [ -n "$CHECKPOINT" ]; then
    FLAGS+=(--ptuning_checkpoint "$CHECKPOINT")
fi
# Columns that are not named here are detected from the field names.
for column in prompt:PROMPT_COLUMN response:RESPONSE_COLUMN history:HISTORY_COLUMN; do
    name="${column#*:}"
    if [ -n "${!name:-}" ]; then
        FLAGS+=("--${column%:*}_column" "${!name}")
    fi
done
if [ -n "${OUTPUT:-}" ]; then
    FLAGS+=(--output_dir "$OUTPUT")
fi

exec "$PYTHON" -m chatglm_ptuning evaluate \
    --model_name_or_path "$MODEL" \
    --test_file "$TEST_FILE" \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    --per_device_eval_batch_size "$BATCH" \
    ${FLAGS[@]+"${FLAGS[@]}"} \
    "$@"
