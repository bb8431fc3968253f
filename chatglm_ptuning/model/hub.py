"""Finds a base in a folder, or downloads it from the Hugging Face or ModelScope hub.

Only weights, vocabularies and settings are downloaded: a repository's Python files are neither downloaded nor run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from chatglm_ptuning.model.checkpoint_formats import SUPPORTED

HubName = Literal["huggingface", "modelscope"]
"""Hubs by the names that they have in every command."""
HUBS = get_args(HubName)

_SETTINGS = ["*.json", "*.model", "*.jinja"]
_WEIGHTS = ("*.safetensors", "*.bin")
"""In the order of preference: some repositories have both."""
_PROBE_SECONDS = 5


def find_base(
    model_name_or_path: str, hub: HubName = "huggingface", revision: str | None = None, weights: bool = True
) -> Path:
    """The folder of a base; a hub name is found in the hub's own cache, or downloaded into it.

    Args:
        hub: one of `HUBS`, for a name OWNER/NAME that is not a folder.
        revision: branch, tag or commit of a hub name.
        weights: False to download only the settings and the vocabulary.

    Raises:
        FileNotFoundError: if there is no base at a path, or the hub has none of that name or revision.
        ConnectionError: if the hub cannot be reached and its cache has no such base; the message names the way out.
        ImportError: if modelscope is needed and not installed.
        ValueError: for an unknown hub, or a revision of a folder.
    """
    if hub not in HUBS:
        raise ValueError(f"hub must be {' or '.join(HUBS)}, got {hub!r}.")
    name, path = str(model_name_or_path), Path(model_name_or_path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} is not a base: it has no config.json.")
        if revision is not None:
            raise ValueError(f"revision {revision!r} needs a hub name, but {path} is a folder: leave revision out.")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"No base at {path}. Give the folder, with config.json and weights, of {SUPPORTED}, or a hub name such as "
            "THUDM/chatglm3-6b."
        )
    fetch = _from_hugging_face if hub == "huggingface" else _from_modelscope
    folder = fetch(name, revision, _SETTINGS)
    if weights:
        for pattern in _WEIGHTS:
            folder = fetch(name, revision, [pattern])
            if any(folder.glob(pattern)):
                break
    return folder


def _from_hugging_face(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} requires its terms to be accepted: accept them on its page, then run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no folder {name} here, and no repository of that name on the Hugging Face hub (a private one "
            "needs `hf auth login`; for ModelScope set hub to modelscope)."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r} on the Hugging Face hub.") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        hub = "the Hugging Face hub"
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            hub += " (HF_HUB_OFFLINE is set)"
        raise _offline(name, revision, hub, "`hf download` (HF_HOME names the cache)") from error


def _from_modelscope(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub.errors import HubError, NotExistError
    except ImportError as error:
        raise ImportError("hub 'modelscope' needs modelscope: pip install modelscope.") from error

    reachable = _modelscope_answers()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=not reachable))
    except NotExistError as error:
        raise FileNotFoundError(
            f"There is no folder {name} here, and no repository of that name"
            f"{f' and revision {revision!r}' if revision else ''} on ModelScope."
        ) from error
    except HubError as error:
        if reachable:
            raise ConnectionError(f"ModelScope refused {name}: {error}") from error
        raise _offline(name, revision, "ModelScope", "`modelscope download` (MODELSCOPE_CACHE names it)") from error


def _modelscope_answers() -> bool:
    """Whether ModelScope can be reached; its client would retry for half a minute to find out."""
    import requests
    from modelscope.hub.utils.utils import get_endpoint

    try:
        requests.head(get_endpoint(), timeout=_PROBE_SECONDS)
    except requests.RequestException:
        return False
    return True


def _offline(name: str, revision: str | None, hub: str, command: str) -> ConnectionError:
    wanted = f"{name} at revision {revision}" if revision else name
    return ConnectionError(
        f"There is no folder {name} here, {hub} cannot be reached, and its cache does not have "
        f"{wanted}. Download it on a machine with a connection, by {command} or git, copy the folder here, and give "
        "its path as model_name_or_path."
    )
