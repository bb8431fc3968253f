#!/usr/bin/env bash
# Training with DeepSpeed, with every flag spelled out, as a template for your own script. For example
#
#   MODEL=/path/to/chatglm3-6b NUM_GPUS=4 DS_CONFIG=ds_config/zero3.json bash scripts/ds_train.sh
#
# Without settings: two processes on the bundled chatglm-nano. The global batch is 2 x 4 x NUM_GPUS rows.
# Unlike train.sh, it resumes from the last checkpoint if --output_dir has one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/scripts/launch.sh"
ensure_environment

if [ "$LAUNCHER" != slurm ] && [ -z "${HOSTFILE:-}" ] && [ "$NNODES" -eq 1 ] && [ "$NUM_GPUS" -eq 1 ]; then
    NUM_GPUS=2
fi
DS_CONFIG=${DS_CONFIG:-$ROOT/ds_config/zero2.json}

launch train \
    --do_train \
    --model_name_or_path "${MODEL:-$ROOT/data/chatglm-nano}" \
    --train_file "${TRAIN_FILE:-$ROOT/data/news_topic/train.json}" \
    ${PROMPT_COLUMN:+--prompt_column "$PROMPT_COLUMN"} \
    ${RESPONSE_COLUMN:+--response_column "$RESPONSE_COLUMN"} \
    --output_dir "${OUTPUT:-$CHATGLM_PTUNING_OUTPUT/deepspeed}" \
    --max_source_length 128 \
    --max_target_length 128 \
    --pre_seq_len 128 \
    --prefix_init data \
    --learning_rate 1e-2 \
    --lr_scheduler_type linear \
    --max_steps 3000 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 4 \
    --max_grad_norm 1.0 \
    --logging_steps 10 \
    --save_steps 500 \
    --save_total_limit 3 \
    --seed 42 \
    "$@"
