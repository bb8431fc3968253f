"""The official P-Tuning v2 format: parameters under `transformer.prefix_encoder.`, alone or inside the whole model."""

from __future__ import annotations

from pathlib import Path

import torch

from chatglm_ptuning.files import read_json_object, read_tensors
from chatglm_ptuning.prefix.checkpoint import (
    PREFIX_KEY,
    PrefixCheckpoint,
    PrefixMetadata,
    is_prefix_key,
    prefix_parameters,
)
from chatglm_ptuning.prefix.shape import PrefixShape

WEIGHTS_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""The official trainer writes the first; a trainer that saved the whole model may have written any of them."""
FILES = WEIGHTS_FILES[0]


def holds(path: Path) -> bool:
    """Whether a folder has one of the official files; a file may have any name."""
    return path.is_file() or any((path / name).exists() for name in WEIGHTS_FILES)


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix from a file, or from the first official file in a folder.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: naming the file, if it is damaged, has no prefix, or does not fit the base.
    """
    source = path if path.is_file() else next(path / name for name in WEIGHTS_FILES if (path / name).exists())
    tensors = _read_shards(source) if source.suffix == ".json" else read_tensors(source, is_prefix_key)
    if not tensors:
        raise ValueError(f"{source} holds no parameter that starts with {PREFIX_KEY}; it is not a P-Tuning v2 prefix.")
    parameters = prefix_parameters(tensors)
    return PrefixCheckpoint(source, PrefixMetadata.of_parameters(parameters, source, shape), parameters)


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ValueError(f"{index} has no weight_map.")
    shards = sorted({shard for key, shard in shard_of.items() if is_prefix_key(key)})
    return {key: value for shard in shards for key, value in read_tensors(index.parent / shard, is_prefix_key).items()}
