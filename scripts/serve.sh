#!/usr/bin/env bash
# Serves a folder of prefixes over one base as OpenAI's API. Without flags: the bundled base with the prefixes in output/.
#   bash scripts/serve.sh --model_name_or_path /models/chatglm3-6b --prefix_dir output --port 8000
# Other machines may ask with a key: CHATGLM_PTUNING_API_KEY=... bash scripts/serve.sh --host 0.0.0.0
# By vLLM, in an environment of its own (docs/vllm.md): ENGINE=vllm bash scripts/serve.sh --vllm_python vllm-env/bin/python
# All flags: bash scripts/serve.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment
exec "$PYTHON" -m chatglm_ptuning serve --engine "${ENGINE:-kit}" "$@"
