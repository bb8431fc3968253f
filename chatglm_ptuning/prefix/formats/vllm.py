"""A prefix for vLLM: one file `NAME.vllm.safetensors`, read by this kit's connector in vLLM's workers.

It holds `key_values`, float32 `[num_layers, 2, length, groups, kv_channels]`, keys first. vLLM counts a prefix among
the positions, so that a text starts at `length`: the keys are rotated to it. The metadata of the file are texts:

- `ptuning_vllm`: version of this format.
- `name`, `length`, `content_sha256`: the prefix's name, its virtual tokens, and a hash of its keys and values.
- `prefix`: JSON of PrefixMetadata, with the sizes and the fingerprint of the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chatglm_ptuning.files import read_tensors, write_atomically
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata, embedding_of, has_projection
from chatglm_ptuning.prefix.rotation import rotate_keys
from chatglm_ptuning.prefix.shape import PrefixShape
from chatglm_ptuning.version import kit_version

SUFFIX = ".vllm.safetensors"
FILES = f"NAME{SUFFIX}"
_VERSION = "1"
_VERSION_KEY = "ptuning_vllm"


def holds(path: Path) -> bool:
    """Whether a file, or a file in a folder, is named as a prefix for vLLM."""
    return bool(_files(path))


def has_prefix(path: Path) -> bool:
    """True: a file of this name holds nothing else, so faults in it are reported."""
    return True


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix of a file, or of the one such file in a folder, with its keys rotated back.

    Raises:
        ValueError: naming the file, if it is damaged, of another version, or does not fit the base; if a folder has
            several.
    """
    files = _files(path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several prefixes for vLLM ({names}): name one of the files.")
    (source,) = files
    fields, tensor = _metadata(source), read_tensors(source).get("key_values")
    metadata = _prefix_metadata(fields, source)
    expected = (metadata.num_layers, 2, metadata.pre_seq_len, *metadata.shape.sizes[1:])
    if tensor is None or tuple(tensor.shape) != expected:
        found = None if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{source} holds key_values of size {found}, but its metadata say {expected}.")
    if fields.get("content_sha256") != content_hash(tensor):
        raise ValueError(f"{source} is damaged: its content does not have the hash that its metadata record.")
    if metadata.shape.sizes != shape.sizes:
        raise ValueError(
            f"{source} does not fit this base: the prefix is for (num_layers, multi_query_group_num, kv_channels) = "
            f"{metadata.shape.sizes}, the base has {shape.sizes}."
        )
    key_values = tensor.float().permute(2, 0, 1, 3, 4).flatten(1, 2)
    moved = rotate_keys(key_values, -metadata.pre_seq_len, shape)
    return PrefixCheckpoint(source, metadata, {"embedding.weight": moved.flatten(1)})


def write(folder: Path, checkpoint: PrefixCheckpoint, shape: PrefixShape, name: str | None = None) -> Path:
    """Writes `NAME.vllm.safetensors`, and returns its path.

    Args:
        checkpoint: the prefix, folded: its `embedding.weight` is keys and values, `[length, kv_size]`.
        shape: sizes of the base, with its rotary positions.
        name: the name under which vLLM serves it; by default that of the folder.

    Raises:
        ValueError: if the prefix has a projection, or vLLM cannot serve it (`check_servable`).
        OSError: if the disk is full or the folder cannot be written; an earlier file stays intact.
    """
    check_servable(checkpoint, shape)
    if has_projection(checkpoint.parameters):
        raise ValueError(f"{checkpoint.source} has a projection: a prefix for vLLM is written folded.")
    name = folder.resolve().name if name is None else name
    table = embedding_of(checkpoint.parameters, checkpoint.source).detach().to("cpu", torch.float32)
    length = len(table)
    moved = rotate_keys(table.view(length, *shape.per_token), length, shape)
    key_values = moved.unflatten(1, (shape.num_layers, 2)).permute(1, 2, 0, 3, 4).contiguous()
    metadata = replace(checkpoint.metadata, prefix_projection=False, kit_version=kit_version())
    fields = {
        "format": "pt",
        _VERSION_KEY: _VERSION,
        "name": name,
        "length": str(length),
        "content_sha256": content_hash(key_values),
        "prefix": json.dumps(asdict(metadata), ensure_ascii=False),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{SUFFIX}"
    with write_atomically(path) as temporary:
        save_file({"key_values": key_values}, temporary, metadata=fields)
    return path


def check_servable(checkpoint: PrefixCheckpoint, shape: PrefixShape) -> None:
    """Checks that vLLM computes a prefix as this kit does.

    Raises:
        ValueError: with the reason and the way out, if not.
    """
    source, metadata = checkpoint.source, checkpoint.metadata
    if not checkpoint.generates:
        raise ValueError(
            f"{source} was trained with a linear head (task {metadata.task}). vLLM generates text and cannot serve "
            "heads: use `chatglm-ptuning evaluate` for it, or train the task with --head generation."
        )
    if not metadata.trained:
        raise ValueError(f"The prefix in {source} was saved untrained: its values are random. Train it first.")
    if shape.position_scale != 1.0:
        raise ValueError(
            f"{source} cannot be served by vLLM: on this base (ChatGLM2-6B-32K) rope_ratio divides the positions by "
            f"{shape.position_scale:g}, and vLLM multiplies the rotary base by it, so that answers would differ. Serve "
            "it with this kit's own engine."
        )


def content_hash(key_values: torch.Tensor) -> str:
    """A SHA-256 over the shape and the numbers of a prefix, float32."""
    content = key_values.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(f"{tuple(content.shape)}".encode() + content.numpy().tobytes()).hexdigest()


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else path.glob(f"*{SUFFIX}") if path.is_dir() else []
    return sorted(file for file in found if file.name.endswith(SUFFIX) and not file.name.startswith("."))


def _metadata(source: Path) -> dict[str, str]:
    try:
        with safe_open(source, framework="pt") as file:
            fields = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{source} is damaged or not a safetensors file: {error}.") from error
    if fields.get(_VERSION_KEY) != _VERSION:
        raise ValueError(
            f"{source} has version {fields.get(_VERSION_KEY)!r} of the format for vLLM; this kit reads {_VERSION!r}. "
            "Export the prefix again by `chatglm-ptuning export --to vllm`."
        )
    return fields


def _prefix_metadata(fields: Mapping[str, str], source: Path) -> PrefixMetadata:
    try:
        content = json.loads(fields["prefix"])
        known = PrefixMetadata.__dataclass_fields__
        return PrefixMetadata(**{key: value for key, value in content.items() if key in known})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"The metadata of {source} do not describe a prefix: {error!r}.") from error
