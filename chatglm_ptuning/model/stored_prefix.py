"""The prefix that the folder of a base holds among its weights, as official fine-tuning may leave it."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file, logging

from chatglm_ptuning.files import read_json_object_or_empty
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.prefix.batch import JOINT
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.formats import official

logger = logging.get_logger(__name__)


def folder_of_base(
    name_or_path: str | PathLike[str] | None, config: ChatGLMConfig, arguments: Mapping[str, Any]
) -> Path | None:
    """The folder from which a base was loaded, that of the hub's cache for a hub name; None if there is none.

    Args:
        arguments: those of `from_pretrained`.
    """
    if name_or_path is None:
        return None
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / arguments.get("subfolder", "")
    where = {name: arguments[name] for name in ("cache_dir", "subfolder", "token") if name in arguments}
    revision = getattr(config, "_commit_hash", None) or arguments.get("revision")
    file = cached_file(
        str(name_or_path),
        CONFIG_NAME,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return None if file is None else Path(file).parent


def name_of_base(folder: Path) -> str:
    """The name of a base by its folder: that of the folder, or of the repository in a hub's cache.

    It has "-" where the folder has "+", which stands between the names of prefixes that are used together.
    """
    folder = folder.absolute() if folder.name not in ("", "..") else folder.resolve()
    name = folder.parents[1].name.split("--")[-1] if folder.parent.name == "snapshots" else folder.name
    return name.replace(JOINT, "-")


def read_stored_prefix(folder: Path, config: ChatGLMConfig) -> PrefixCheckpoint | None:
    """Reads the prefix among the weights in the folder of a base; None if there is none.

    Logs a warning if `config.json` sets `pre_seq_len`, and there is none.

    Args:
        config: of the loaded base, with `pre_seq_len` if a new prefix is to be trained.

    Raises:
        ValueError: naming the file, if the prefix is damaged, or does not fit the base or `config.json`.
    """
    recorded = read_json_object_or_empty(folder / CONFIG_NAME)
    length, projection = recorded.get("pre_seq_len"), bool(recorded.get("prefix_projection"))
    if not official.has_prefix(folder):
        if length and not config.pre_seq_len:
            logger.warning(
                f"{folder / CONFIG_NAME} sets pre_seq_len {length}, but the weights beside it hold no prefix: this is "
                f"the plain base. Load a trained prefix by load_prefix, or pass pre_seq_len={length} to train one."
            )
        return None
    checkpoint = official.read(folder, config.prefix_shape)
    found = checkpoint.metadata
    if length and (length, projection) != (found.pre_seq_len, found.prefix_projection):
        raise ValueError(
            f"{folder / CONFIG_NAME} says pre_seq_len {length} and prefix_projection {projection}, but "
            f"{checkpoint.source} holds a prefix with pre_seq_len {found.pre_seq_len} and prefix_projection "
            f"{found.prefix_projection}: correct {CONFIG_NAME}."
        )
    return checkpoint
