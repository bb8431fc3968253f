"""This kit's own format: `prefix_config.json` with `prefix_model.safetensors` in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch

from chatglm_ptuning.files import read_json_object, read_tensors, write_json, write_tensors
from chatglm_ptuning.prefix.checkpoint import (
    PREFIX_KEY,
    PrefixCheckpoint,
    PrefixMetadata,
    embedding_of,
    has_projection,
    is_prefix_key,
    prefix_parameters,
)
from chatglm_ptuning.prefix.fingerprint import FINGERPRINT_FIELDS
from chatglm_ptuning.prefix.shape import PrefixShape
from chatglm_ptuning.version import kit_version

METADATA_FILE = "prefix_config.json"
WEIGHTS_FILE = "prefix_model.safetensors"
FILES = f"{METADATA_FILE} with {WEIGHTS_FILE}"


def holds(path: Path) -> bool:
    """Whether a folder or file is a prefix in this format."""
    if path.is_file():
        return path.name in (METADATA_FILE, WEIGHTS_FILE)
    return (path / METADATA_FILE).exists() or (path / WEIGHTS_FILE).exists()


def has_prefix(path: Path) -> bool:
    """True: these files hold nothing else, so faults in them are reported."""
    return True


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix in a folder, or in the folder of one of its files; the files record its sizes.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: naming the file, if one is damaged or the two contradict each other.
    """
    folder = path.parent if path.is_file() else path
    for name in (METADATA_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise FileNotFoundError(f"The prefix in {folder} is incomplete: {name} is missing.")
    metadata = _read_metadata(folder / METADATA_FILE)
    source = folder / WEIGHTS_FILE
    tensors = read_tensors(source)
    parameters = prefix_parameters(tensors)
    expected = (metadata.pre_seq_len, metadata.shape.kv_size)
    found = tuple(embedding_of(parameters, source).shape)
    if found != expected:
        raise ValueError(f"{source} holds a prefix of size {found}, but {METADATA_FILE} beside it says {expected}.")
    if metadata.prefix_projection != has_projection(parameters):
        raise ValueError(
            f"{METADATA_FILE} in {folder} says prefix_projection={metadata.prefix_projection}, {WEIGHTS_FILE} has "
            f"{', '.join(parameters)}."
        )
    heads = {key: value for key, value in tensors.items() if not is_prefix_key(key)}
    return PrefixCheckpoint(source, metadata, parameters, heads)


def write(
    folder: str | PathLike[str],
    metadata: PrefixMetadata,
    parameters: Mapping[str, torch.Tensor],
    heads: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes both files so that a reader never sees half of either.

    Args:
        parameters, heads: as in PrefixCheckpoint, on any device and in any precision; written in float32.

    Raises:
        OSError: if the disk is full or the folder cannot be written; an earlier checkpoint in the folder stays intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX_KEY + name: tensor for name, tensor in parameters.items()} | dict(heads or {})
    tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / METADATA_FILE, {**asdict(metadata), "kit_version": kit_version()})


def _read_metadata(source: Path) -> PrefixMetadata:
    fields = read_json_object(source)
    attention = fields.get("source_attention", "causal")  # version 0.1.0 recorded it
    if attention != "causal":
        raise ValueError(
            f"The prefix in {source.parent} was trained with source_attention {attention!r}; this version has causal "
            "attention only. Use version 0.1.0 of chatglm-ptuning for it, or train it again."
        )
    known = PrefixMetadata.__dataclass_fields__
    try:
        metadata = PrefixMetadata(**{key: value for key, value in fields.items() if key in known})
    except TypeError as error:
        raise ValueError(f"{source} does not describe a prefix: {error}.") from error
    for name in ("pre_seq_len", "num_layers", "multi_query_group_num", "kv_channels"):
        value = getattr(metadata, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{source}: {name} must be a positive integer, got {value!r}.")
    tasks = metadata.tasks
    if not (isinstance(tasks, dict) and all(isinstance(entry, dict) and "head" in entry for entry in tasks.values())):
        raise ValueError(f"{source}: tasks must map names to objects that have a head.")
    fingerprint = metadata.base_fingerprint
    if fingerprint is not None and not (isinstance(fingerprint, dict) and fingerprint.keys() >= FINGERPRINT_FIELDS):
        raise ValueError(f"{source}: base_fingerprint must be null or hold {', '.join(sorted(FINGERPRINT_FIELDS))}.")
    return metadata
