#!/usr/bin/env bash
# Opens a chat page for the browser. Without flags: the bundled base with the prefixes in output/.
#   bash scripts/web_demo.sh --model_name_or_path /models/chatglm3-6b --prefix_dir output --port 7860
# Other machines may open it with a password: CHATGLM_PTUNING_PASSWORD=... bash scripts/web_demo.sh --host 0.0.0.0
# All flags: bash scripts/web_demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
exec "$PYTHON" -m chatglm_ptuning web_demo "$@"
