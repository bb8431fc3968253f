# Sourced by the other scripts: finds the checkout, and a Python environment with the packages that the kit needs.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export CHATGLM_PTUNING_OUTPUT="${CHATGLM_PTUNING_OUTPUT:-$ROOT/output}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Prints the pinned packages that the given Python lacks or has in another version.
_missing_packages() {
    "$1" - "$ROOT/requirements.txt" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1], encoding="utf-8"):
    name, _, wanted = line.partition("#")[0].strip().partition("==")
    if name:
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            print(f"{name} (wanted {wanted}, found {found})")
PY
}

# Sets PYTHON: an active environment (venv or conda), or a Python with all packages; otherwise creates .venv.
ensure_environment() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        PYTHON="$(command -v python)"
    elif [ -x "$ROOT/.venv/bin/python" ]; then
        PYTHON="$ROOT/.venv/bin/python"
    elif [ -z "$(_missing_packages "$(command -v python3)")" ]; then
        PYTHON="$(command -v python3)"
    else
        echo "Setting up an environment in $ROOT/.venv ..." >&2
        python3 -m venv "$ROOT/.venv"
        PYTHON="$ROOT/.venv/bin/python"
    fi
    local missing
    missing="$(_missing_packages "$PYTHON")"
    if [ -n "$missing" ] && [ -z "${SKIP_INSTALL:-}" ]; then
        echo "Installing into $("$PYTHON" -c 'import sys; print(sys.prefix)') (SKIP_INSTALL=1 leaves it as it is):" >&2
        echo "$missing" >&2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    fi
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        # On a CPU, returning the memory of large tensors to the system at every step is slow.
        export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
        export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
        export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
    else
        # The passes of a step have any number of tokens: torch then extends its blocks of memory, and moves none.
        export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
    fi
}
