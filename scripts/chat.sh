#!/usr/bin/env bash
# Chats in the terminal. Without flags: with the bundled base and the prefix trained last. For example
#   bash scripts/chat.sh --model_name_or_path /models/chatglm3-6b --ptuning_checkpoint ads=output/ads
# All flags: bash scripts/chat.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
exec "$PYTHON" -m chatglm_ptuning chat "$@"
