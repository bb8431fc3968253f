"""PEFT's prefix tuning: `adapter_config.json` with `adapter_model.safetensors` (or `.bin`) in a folder."""

from __future__ import annotations

from pathlib import Path

from chatglm_ptuning.files import read_json_object, read_json_object_or_empty, read_tensors
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata
from chatglm_ptuning.prefix.rotation import rotate_keys
from chatglm_ptuning.prefix.shape import PrefixShape

METADATA_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FILES = METADATA_FILE


def holds(path: Path) -> bool:
    """Whether a folder or file is an adapter of PEFT, of any type."""
    return path.name == METADATA_FILE if path.is_file() else (path / METADATA_FILE).exists()


def has_prefix(path: Path) -> bool:
    """Whether an adapter is one of prefix tuning, and has its weights."""
    folder = path.parent if path.is_file() else path
    complete = any((folder / name).exists() for name in WEIGHTS_FILES)
    return complete and read_json_object_or_empty(folder / METADATA_FILE).get("peft_type") == "PREFIX_TUNING"


def type_of(path: Path) -> str | None:
    """The type of an adapter (`PREFIX_TUNING`, `LORA`, ...).

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    return read_json_object(path if path.is_file() else path / METADATA_FILE).get("peft_type")


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix of an adapter.

    PEFT saves the output of its projection, so the result has no projection. In PEFT the virtual tokens take positions,
    and those of the text start at `pre_seq_len`. In this kit they start at 0, so the keys are rotated back.

    Raises:
        FileNotFoundError: if the weights are missing.
        ValueError: naming the file, if it is damaged, of another adapter type, or does not fit the base.
    """
    folder = path.parent if path.is_file() else path
    adapter = read_json_object(folder / METADATA_FILE)
    if adapter.get("peft_type") != "PREFIX_TUNING":
        raise ValueError(
            f"{folder / METADATA_FILE} is an adapter of type {adapter.get('peft_type')}; only PREFIX_TUNING can be "
            "used as a prefix. `chatglm-ptuning evaluate` scores LoRA adapters, PEFT loads them."
        )
    safe, pickled = (folder / name for name in WEIGHTS_FILES)
    source = safe if safe.exists() else pickled
    if not source.exists():
        raise FileNotFoundError(f"The PEFT adapter in {folder} is incomplete: {safe.name} is missing.")
    tensors = read_tensors(source, lambda name: name == "prompt_embeddings")
    if not tensors:
        raise ValueError(f"{source} has no prompt_embeddings; it is not a saved prefix-tuning adapter.")
    parameters = {"embedding.weight": tensors["prompt_embeddings"]}
    metadata = PrefixMetadata.of_parameters(parameters, source, shape, adapter.get("base_model_name_or_path"))
    table = parameters["embedding.weight"].float()
    moved = rotate_keys(table.view(len(table), *shape.per_token), -metadata.pre_seq_len, shape)
    return PrefixCheckpoint(source, metadata, {"embedding.weight": moved.flatten(1)})
