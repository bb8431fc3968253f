"""The official P-Tuning v2 format: parameters under `transformer.prefix_encoder.`, alone or inside the whole model.

Trainers and wrappers put other names around these, and dictionaries around the parameters; all of them are read. So
is the `state_dict` of a prefix encoder alone, whose names have nothing in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from chatglm_ptuning.files import read_tensors, read_weight_map, tensor_names, write_atomically
from chatglm_ptuning.prefix.checkpoint import PREFIX_KEY, PrefixCheckpoint, PrefixMetadata
from chatglm_ptuning.prefix.shape import PrefixShape

WEIGHTS_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""The official trainer writes the first; a trainer that saved the whole model may have written any of them."""
FILES = WEIGHTS_FILES[0]

# Metadata, and a part of what ZeRO-3 has partitioned.
_NO_WEIGHTS = re.compile(r".*(?<!\.index)\.json|zero_pp_rank_.*")
_PREFIX_KEY = re.compile(r"(?:.+\.)?prefix_encoder\.(.+)")
# Modules that torch.compile, FSDP, DDP, checkpointing and PEFT put around those of the prefix encoder.
_WRAPPER = re.compile(r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|modules_to_save\.[^.]+)\.")
# Others are no parameters, such as the states of an optimizer.
_PARAMETER = re.compile(r"(?:embedding|trans\.\d+)\.(?:weight|bias)")


def holds(path: Path) -> bool:
    """Whether a folder has one of the official files; a file may have any name but those of other formats."""
    if path.is_file():
        return _NO_WEIGHTS.fullmatch(path.name) is None
    return bool(_sources(path))


def has_prefix(path: Path) -> bool:
    """Whether a file, or one of the official files in a folder, can be read and holds a prefix."""
    return any(_has_prefix(source) for source in _sources(path))


def read(path: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix from a file, or from the first official file with a prefix in a folder.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: naming the file, if it is damaged, has no prefix, or does not fit the base.
    """
    sources = _sources(path)
    source = next((source for source in sources if _has_prefix(source)), sources[0])
    if source.suffix == ".json":
        shards = sorted(
            {source.parent / shard for key, shard in read_weight_map(source).items() if _parameter_name(key)}
        )
    else:
        shards = [source]
    return read_files(shards, source, shape)


def read_files(files: list[Path], source: Path, shape: PrefixShape) -> PrefixCheckpoint:
    """Reads the prefix from the files that hold its parameters.

    Args:
        source: the file to name in messages.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    parameters: dict[str, torch.Tensor] = {}
    keys: dict[str, str] = {}
    for file in files:
        for key, value in read_tensors(file, lambda key: _parameter_name(key) is not None, nested=True).items():
            name = _parameter_name(key)
            if name in parameters and not torch.equal(parameters[name], value):
                raise ValueError(
                    f"{source} holds two different prefixes, as {keys[name]} and as {key}: save the one to use alone."
                )
            parameters[name], keys[name] = value, key
    if not parameters:
        raise ValueError(f"{source} holds no parameter that starts with {PREFIX_KEY}; it is not a P-Tuning v2 prefix.")
    return PrefixCheckpoint(source, PrefixMetadata.of_parameters(parameters, source, shape), parameters)


def write(folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Writes `pytorch_model.bin` as the official trainer does, in float32.

    Args:
        parameters: those of the prefix encoder by their names in it, with its projection.

    Raises:
        OSError: if the disk is full or the folder cannot be written; an earlier file stays intact.
    """
    tensors = {
        PREFIX_KEY + name: value.detach().to("cpu", torch.float32).contiguous() for name, value in parameters.items()
    }
    with write_atomically(folder / FILES) as temporary:
        torch.save(tensors, temporary)


def holds_prefix_alone(file: Path) -> bool:
    """Whether a file can be read, and holds the parameters of a prefix under their official names and nothing else."""
    try:
        names = tensor_names(file, nested=True)
    except (OSError, ValueError):
        return False
    return all(name.startswith(PREFIX_KEY) for name in names)


def _sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else [path / name for name in WEIGHTS_FILES if (path / name).exists()]


def _has_prefix(source: Path) -> bool:
    try:
        if source.suffix == ".json":
            shard_of = read_weight_map(source)
            names = [key for key, shard in shard_of.items() if (source.parent / shard).exists()]
        else:
            names = tensor_names(source, nested=True)
    except (OSError, ValueError):
        return False
    return any(_parameter_name(name) for name in names)


def _parameter_name(key: str) -> str | None:
    """The name, in the prefix encoder, of a parameter of a checkpoint; None for other parameters."""
    match = _PREFIX_KEY.fullmatch(key)
    name = _WRAPPER.sub("", match[1]) if match else key
    return name if _PARAMETER.fullmatch(name) else None
