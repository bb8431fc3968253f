#!/usr/bin/env bash
# Trains a P-Tuning v2 prefix. Without settings: on the bundled chatglm-nano, to name the topics of the bundled headlines.
#
#   MODEL=/path/to/chatglm3-6b bash scripts/train.sh
#   MODEL=/path/to/chatglm3-6b TRAIN_FILE=train.json VALIDATION_FILE=dev.json NUM_GPUS=8 bash scripts/train.sh
#
# Several GPUs and machines: see launch.sh (NUM_GPUS, DS_CONFIG, NNODES, HOSTFILE, MASTER_ADDR, ...) and
# docs/multi_node.md.
# Any flag of `chatglm-ptuning train` may follow and overrides the settings here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/scripts/launch.sh"
ensure_environment

if [ -z "${MODEL:-}" ]; then
    MODEL="$ROOT/data/chatglm-nano"
    NANO_DEFAULTS=1
fi

PRE_SEQ_LEN=${PRE_SEQ_LEN:-${NANO_DEFAULTS:+16}}
PRE_SEQ_LEN=${PRE_SEQ_LEN:-128}
LR=${LR:-${NANO_DEFAULTS:+1e-1}}
LR=${LR:-1e-2}
BATCH=${BATCH:-${NANO_DEFAULTS:+16}}
BATCH=${BATCH:-4}
ACCUMULATION=${ACCUMULATION:-${NANO_DEFAULTS:+1}}
ACCUMULATION=${ACCUMULATION:-4}
if [ -z "${TRAIN_FILE:-}" ]; then
    BUNDLED_DATA=1
    TRAIN_FILE="$ROOT/data/news_topic/train.json"
    VALIDATION_FILE="${VALIDATION_FILE:-$ROOT/data/news_topic/dev.json}"
fi
MAX_STEPS=${MAX_STEPS:-${BUNDLED_DATA:+400}}
MAX_STEPS=${MAX_STEPS:-3000}
SAVE_STEPS=${SAVE_STEPS:-$(((MAX_STEPS + 3) / 4))}
MAX_SOURCE_LENGTH=${MAX_SOURCE_LENGTH:-128}
MAX_TARGET_LENGTH=${MAX_TARGET_LENGTH:-128}
if _several_processes; then
    DS_CONFIG=${DS_CONFIG:-$ROOT/ds_config/zero1.json}
fi
# The bundled job preserves the abilities of the base (--preserve_base, docs/measurements.md).
PRESERVE_FLAGS=()
if [ -n "${NANO_DEFAULTS:-}" ] && [ -n "${BUNDLED_DATA:-}" ] && [[ "${DS_CONFIG:-}" != *zero3* ]]; then
    PRESERVE_FLAGS=(--preserve_base 0.3 --preserve_batch_size 4)
fi
OUTPUT=${OUTPUT:-$CHATGLM_PTUNING_OUTPUT/$(basename "$MODEL")-$(basename "$(dirname "$TRAIN_FILE")")-$PRE_SEQ_LEN}

# Without validation data the run only trains.
STAGES=(--do_train)
if [ -n "${VALIDATION_FILE:-}" ]; then
    STAGES+=(--do_eval --do_predict --compare_base --validation_file "$VALIDATION_FILE")
fi

# Columns that are not named here are detected from the field names.
COLUMNS_FLAGS=()
for column in prompt:PROMPT_COLUMN response:RESPONSE_COLUMN history:HISTORY_COLUMN; do
    name="${column#*:}"
    if [ -n "${!name:-}" ]; then
        COLUMNS_FLAGS+=("--${column%:*}_column" "${!name}")
    fi
done

launch train \
    "${STAGES[@]}" \
    --model_name_or_path "$MODEL" \
    --train_file "$TRAIN_FILE" \
    ${COLUMNS_FLAGS[@]+"${COLUMNS_FLAGS[@]}"} \
    --output_dir "$OUTPUT" \
    --overwrite_output_dir \
    --max_source_length "$MAX_SOURCE_LENGTH" \
    --max_target_length "$MAX_TARGET_LENGTH" \
    --per_device_train_batch_size "$BATCH" \
    --per_device_eval_batch_size "$BATCH" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --max_steps "$MAX_STEPS" \
    --logging_steps 10 \
    --save_steps "$SAVE_STEPS" \
    --learning_rate "$LR" \
    --pre_seq_len "$PRE_SEQ_LEN" \
    ${PRESERVE_FLAGS[@]+"${PRESERVE_FLAGS[@]}"} \
    "$@"
