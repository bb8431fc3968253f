"""PEFT's prefix tuning and CARTRIDGE: `adapter_config.json` with `adapter_model.safetensors` (or `.bin`) in a folder.

Both hold the same keys and values, and give the same results. A CARTRIDGE trains them directly, with an option to
freeze the first ones; prefix tuning may train a projection, which PEFT folds when it saves.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from chatglm_ptuning.files import read_json_object, read_json_object_or_empty, read_tensors, write_json, write_tensors
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata
from chatglm_ptuning.prefix.rotation import rotate_keys
from chatglm_ptuning.prefix.shape import PrefixShape

logger = logging.getLogger(__name__)

METADATA_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FILES = METADATA_FILE
PREFIX_TUNING, CARTRIDGE = "PREFIX_TUNING", "CARTRIDGE"
PREFIX_TYPES = (PREFIX_TUNING, CARTRIDGE)
"""The types of adapters that are prefixes."""
FIRST_POSITION = "first_position"
"""A key of this kit in adapter_config.json: the position of the first token of a text, 0 or the prefix's length."""

# Bases whose own code PEFT 0.11 could train, in paths and hub names. Those for transformers' classes end in "-hf".
_OFFICIAL_CODE = re.compile(r"(glm-4-9b|codegeex4-all-9b)(?!-0414)(?!.*-hf)", re.IGNORECASE)


def holds(path: Path) -> bool:
    """Whether a folder or file is an adapter of PEFT, of any type."""
    return path.name == METADATA_FILE if path.is_file() else (path / METADATA_FILE).exists()


def has_prefix(path: Path) -> bool:
    """Whether an adapter is a prefix, and has its weights."""
    folder = path.parent if path.is_file() else path
    complete = any((folder / name).exists() for name in WEIGHTS_FILES)
    return complete and read_json_object_or_empty(folder / METADATA_FILE).get("peft_type") in PREFIX_TYPES


def type_of(path: Path) -> str | None:
    """The type of an adapter (`PREFIX_TUNING`, `CARTRIDGE`, `LORA`, ...).

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    return read_json_object(path if path.is_file() else path / METADATA_FILE).get("peft_type")


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix of an adapter.

    PEFT saves the output of its projection, so the result has no projection. Positions of the text start at 0 in this
    kit. Under PEFT they start where the code of the base starts them behind a cache: at `pre_seq_len` in transformers'
    classes, so the keys are rotated back; at 0 in GLM-4's own modeling_chatglm.py, because PEFT drops the position ids
    and that code then counts the new tokens alone. `first_position` in adapter_config.json says which; without it, the
    name of the base does.

    Raises:
        FileNotFoundError: if the weights are missing.
        ValueError: naming the file, if it is damaged, of another adapter type, or does not fit the base.
    """
    folder = path.parent if path.is_file() else path
    adapter = read_json_object(folder / METADATA_FILE)
    if adapter.get("peft_type") not in PREFIX_TYPES:
        raise ValueError(
            f"{folder / METADATA_FILE} is an adapter of type {adapter.get('peft_type')}; only "
            f"{' and '.join(PREFIX_TYPES)} can be used as a prefix. `chatglm-ptuning evaluate` scores LoRA adapters, "
            "PEFT loads them."
        )
    safe, pickled = (folder / name for name in WEIGHTS_FILES)
    source = safe if safe.exists() else pickled
    if not source.exists():
        raise FileNotFoundError(f"The PEFT adapter in {folder} is incomplete: {safe.name} is missing.")
    tensors = read_tensors(source, lambda name: name == "prompt_embeddings")
    if not tensors:
        raise ValueError(f"{source} has no prompt_embeddings; it is not a saved {adapter['peft_type']} adapter.")
    parameters = {"embedding.weight": tensors["prompt_embeddings"]}
    metadata = PrefixMetadata.of_parameters(parameters, source, shape, adapter.get("base_model_name_or_path"))
    table = parameters["embedding.weight"].float()
    first = _first_position(adapter, metadata.pre_seq_len, folder / METADATA_FILE)
    moved = rotate_keys(table.view(len(table), *shape.per_token), -first, shape)
    return PrefixCheckpoint(source, metadata, {"embedding.weight": moved.flatten(1)})


def write(folder: Path, checkpoint: PrefixCheckpoint, shape: PrefixShape, peft_type: str = PREFIX_TUNING) -> None:
    """Writes an adapter for the base as transformers' GlmForCausalLM, or in this kit's own classes.

    The keys are rotated for tokens whose positions start at `pre_seq_len`, which is recorded as `first_position`.

    Args:
        folder: exists.
        checkpoint: without projection.
        shape: sizes and rotary positions of the base.
        peft_type: one of `PREFIX_TYPES`.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    table = checkpoint.parameters["embedding.weight"].float()
    length = len(table)
    rotated = rotate_keys(table.view(length, *shape.per_token), length, shape)
    write_tensors(folder / WEIGHTS_FILES[0], {"prompt_embeddings": rotated.flatten(1)})
    width = shape.multi_query_group_num * shape.kv_channels
    own = {"num_frozen_tokens": 0} if peft_type == CARTRIDGE else {"encoder_hidden_size": width}
    settings = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.metadata.base_model_name,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.multi_query_group_num,
        "token_dim": width,
        "num_transformer_submodules": 1,
        **own,
        FIRST_POSITION: length,
    }
    write_json(folder / METADATA_FILE, settings)


def _first_position(adapter: dict[str, Any], length: int, source: Path) -> int:
    """The position of the first token of a text behind a prefix of this length.

    Raises:
        ValueError: naming the file, if it has a value that no code trains with.
    """
    given, base = adapter.get(FIRST_POSITION), str(adapter.get("base_model_name_or_path"))
    if given is not None:
        if isinstance(given, bool) or given not in (0, length):
            raise ValueError(f"{source}: {FIRST_POSITION} must be 0 or {length}, the prefix's length, got {given!r}.")
        return given
    if not _OFFICIAL_CODE.search(base):
        return length
    logger.warning(
        f"{source} was trained on {base}. This is read as trained by the base's own code, in which positions of a text "
        "start at 0. If it was trained by transformers' or this kit's classes, "
        f'set "{FIRST_POSITION}": {length} there.'
    )
    return 0
