"""Prefix checkpoints on disk: what is in one, reading every known form, writing this kit's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from chatglm_ptuning.files import read_json_object, read_tensors, write_atomically
from chatglm_ptuning.prefix.fingerprint import FINGERPRINT_FIELDS
from chatglm_ptuning.version import kit_version

if TYPE_CHECKING:
    from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig

METADATA_FILE = "prefix_config.json"
WEIGHTS_FILE = "prefix_model.safetensors"
OFFICIAL_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""The official trainer writes the first; one that saved the whole model may have left any of them."""
PEFT_METADATA_FILE = "adapter_config.json"
PREFIX_KEY = "transformer.prefix_encoder."
"""In front of every parameter of the prefix encoder, in this kit's files as in the official ones."""
HEADS_KEY = "heads."
"""In front of a task's name and the parameters of its head, where several tasks share a prefix."""

_CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class PrefixMetadata:
    """What `prefix_config.json` says of a prefix.

    Attributes:
        base_fingerprint: see `fingerprint_of`; None if the base is not known (the official and PEFT's forms).
        chat_format: the tokenizer's, of the training data.
        task: what it was trained for, in the user's words.
        training: a summary of the training run.
        head: the name of the head trained beside it (`sequence_classification`, ...); None for the language model.
        labels: what the head's outputs stand for, in their order.
        tasks: of a prefix that several tasks share, each task's `head` and `labels` by its name.
        trained: False if it was saved with its random first values.
    """

    pre_seq_len: int
    prefix_projection: bool
    num_layers: int
    multi_query_group_num: int
    kv_channels: int
    base_model_name: str | None = None
    base_fingerprint: dict[str, Any] | None = None
    chat_format: str | None = None
    task: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    head: str | None = None
    labels: list[str] | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: bool = True
    kit_version: str | None = None

    @property
    def kv_size(self) -> int:
        """Numbers per virtual token."""
        return self.num_layers * 2 * self.multi_query_group_num * self.kv_channels

    def of_task(self, task: str) -> PrefixMetadata:
        """What holds for one of the tasks that share the prefix; for another, or a prefix of one task, as it is."""
        if task not in self.tasks:
            return self
        return replace(self, task=task, head=self.tasks[task]["head"], labels=self.tasks[task].get("labels"))


@dataclass(frozen=True)
class PrefixCheckpoint:
    """A prefix as it was read.

    Attributes:
        source: the file that holds the weights, for messages.
        parameters: the prefix encoder's parameters under their names in it (`embedding.weight`, `trans.0.weight`, ...).
        heads: parameters trained beside the prefix (classification heads) under their full names.
        positions_follow_prefix: True if the tokens' positions started after the prefix when it was trained (PEFT).
    """

    source: Path
    metadata: PrefixMetadata
    parameters: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    positions_follow_prefix: bool = False

    def of_task(self, task: str, head_name: str) -> PrefixCheckpoint:
        """The prefix with the head of one of the tasks that share it; a prefix of one task as it is.

        Args:
            head_name: of the head in the model that is to get it.
        """
        if not self.metadata.tasks:
            return self
        shared = f"{HEADS_KEY}{task}."
        heads = {
            f"{head_name}.{name.removeprefix(shared)}": value
            for name, value in self.heads.items()
            if name.startswith(shared)
        }
        return replace(self, metadata=self.metadata.of_task(task), heads=heads)

    def check_sizes(self, config: ChatGLMConfig) -> None:
        """Checks that the prefix fits the base's layers, groups and channels.

        Raises:
            ValueError: naming the file and both sizes.
        """
        meta = self.metadata
        ours = (config.num_layers, config.multi_query_group_num, config.kv_channels)
        theirs = (meta.num_layers, meta.multi_query_group_num, meta.kv_channels)
        if ours != theirs:
            raise ValueError(
                f"{self.source} does not fit this base: the prefix is for (num_layers, multi_query_group_num, "
                f"kv_channels) = {theirs}, the base has {ours}."
            )
        if config.multi_query_group_num != config.num_key_value_heads:
            raise ValueError(
                f"{self.source} does not fit this base: with multi_query_attention=False a prefix needs "
                f"multi_query_group_num ({config.multi_query_group_num}) equal to num_attention_heads "
                f"({config.num_attention_heads})."
            )


def read_prefix(path: str | PathLike[str], config: ChatGLMConfig) -> PrefixCheckpoint:
    """Reads a prefix in this kit's, the official or PEFT's form.

    Args:
        path: a folder or file in one of these forms; of a folder that holds only `checkpoint-N` folders, the last is
            taken.
        config: of the base. The official and PEFT's forms do not name layers, groups and channels; they are checked
            against it.

    Raises:
        FileNotFoundError: if there is no prefix at `path`.
        ValueError: if the file is damaged or incomplete, naming it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No prefix at {path}: there is no such file or folder.")
    if path.is_file():
        if path.name in (METADATA_FILE, WEIGHTS_FILE):
            return _read_kit(path.parent)
        if path.name == PEFT_METADATA_FILE:
            return _read_peft(path.parent, config)
        return _read_official(path, config)
    if (path / METADATA_FILE).exists() or (path / WEIGHTS_FILE).exists():
        return _read_kit(path)
    if (path / PEFT_METADATA_FILE).exists():
        return _read_peft(path, config)
    for name in OFFICIAL_FILES:
        if (path / name).exists():
            return _read_official(path / name, config)
    checkpoints = sorted(
        (int(match[1]), child)
        for child in path.iterdir()
        if (match := _CHECKPOINT_FOLDER.fullmatch(child.name)) and _holds_prefix(child)
    )
    if checkpoints:
        return read_prefix(checkpoints[-1][1], config)
    raise FileNotFoundError(
        f"No prefix in {path}: expected {METADATA_FILE} with {WEIGHTS_FILE} (this kit), {OFFICIAL_FILES[0]} (official) "
        f"or {PEFT_METADATA_FILE} (PEFT)."
    )


def _holds_prefix(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METADATA_FILE, PEFT_METADATA_FILE, *OFFICIAL_FILES))


def write_prefix(
    folder: str | PathLike[str],
    metadata: PrefixMetadata,
    parameters: Mapping[str, torch.Tensor],
    heads: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes `prefix_config.json` and `prefix_model.safetensors` so that a reader never sees half of either.

    Raises:
        OSError: if the disk is full or the folder cannot be written; what was there before is intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX_KEY + name: tensor for name, tensor in parameters.items()} | dict(heads or {})
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    with write_atomically(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    text = json.dumps({**asdict(metadata), "kit_version": kit_version()}, ensure_ascii=False, indent=2)
    with write_atomically(folder / METADATA_FILE) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _read_kit(folder: Path) -> PrefixCheckpoint:
    for name in (METADATA_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise FileNotFoundError(f"The prefix in {folder} is incomplete: {name} is missing.")
    metadata = _read_metadata(folder / METADATA_FILE)
    source = folder / WEIGHTS_FILE
    tensors = read_tensors(source)
    parameters = _prefix_parameters(tensors, source)
    heads = {key: value for key, value in tensors.items() if not key.startswith(PREFIX_KEY)}
    expected = (metadata.pre_seq_len, metadata.kv_size)
    found = tuple(_embedding(parameters, source).shape)
    if found != expected:
        raise ValueError(f"{source} holds a prefix of size {found}, but {METADATA_FILE} beside it says {expected}.")
    if metadata.prefix_projection != _has_projection(parameters):
        raise ValueError(
            f"{METADATA_FILE} in {folder} says prefix_projection={metadata.prefix_projection}, {WEIGHTS_FILE} has "
            f"{', '.join(parameters)}."
        )
    return PrefixCheckpoint(source, metadata, parameters, heads)


def _read_metadata(source: Path) -> PrefixMetadata:
    fields = read_json_object(source)
    attention = fields.get("source_attention", "causal")  # version 0.1.0 recorded it
    if attention != "causal":
        raise ValueError(
            f"The prefix in {source.parent} was trained with source_attention {attention!r}; this version reads every "
            "prompt causally. Use version 0.1.0 of chatglm-ptuning for it, or train it again."
        )
    known = PrefixMetadata.__dataclass_fields__
    try:
        metadata = PrefixMetadata(**{key: value for key, value in fields.items() if key in known})
    except TypeError as error:
        raise ValueError(f"{source} is not a prefix's description: {error}.") from error
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


def _read_official(source: Path, config: ChatGLMConfig) -> PrefixCheckpoint:
    tensors = _read_shards(source) if source.suffix == ".json" else read_tensors(source, _is_prefix_key)
    if not tensors:
        raise ValueError(f"{source} holds no parameter that starts with {PREFIX_KEY}; it is not a P-Tuning v2 prefix.")
    parameters = _prefix_parameters(tensors, source)
    return PrefixCheckpoint(source, _infer_metadata(parameters, source, config), parameters)


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ValueError(f"{index} has no weight_map.")
    shards = sorted({shard for key, shard in shard_of.items() if _is_prefix_key(key)})
    return {key: value for shard in shards for key, value in read_tensors(index.parent / shard, _is_prefix_key).items()}


def _read_peft(folder: Path, config: ChatGLMConfig) -> PrefixCheckpoint:
    adapter = read_json_object(folder / PEFT_METADATA_FILE)
    if adapter.get("peft_type") != "PREFIX_TUNING":
        raise ValueError(
            f"{folder / PEFT_METADATA_FILE} is an adapter of type {adapter.get('peft_type')}; only PREFIX_TUNING can "
            "be used as a prefix. `chatglm-ptuning evaluate` scores LoRA adapters, PEFT loads them."
        )
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    source = safe if safe.exists() else pickled
    if not source.exists():
        raise FileNotFoundError(f"The PEFT adapter in {folder} is incomplete: {safe.name} is missing.")
    tensors = read_tensors(source, lambda name: name == "prompt_embeddings")
    if not tensors:
        raise ValueError(f"{source} has no prompt_embeddings; it is not a saved prefix-tuning adapter.")
    # PEFT saves the result of its projection, not the projection itself.
    parameters = {"embedding.weight": tensors["prompt_embeddings"]}
    _check_finite(parameters, source)
    metadata = _infer_metadata(parameters, source, config, adapter.get("base_model_name_or_path"))
    return PrefixCheckpoint(source, metadata, parameters, positions_follow_prefix=True)


def _infer_metadata(
    parameters: Mapping[str, torch.Tensor], source: Path, config: ChatGLMConfig, base_model_name: str | None = None
) -> PrefixMetadata:
    pre_seq_len, kv_size = _embedding(parameters, source).shape
    if kv_size != config.prefix_kv_size:
        raise ValueError(
            f"{source} does not fit this base: each virtual token has {kv_size} numbers, the base needs "
            f"{config.prefix_kv_size} ({config.num_layers} layers x 2 x {config.multi_query_group_num} groups x "
            f"{config.kv_channels} channels)."
        )
    return PrefixMetadata(
        pre_seq_len=pre_seq_len,
        prefix_projection=_has_projection(parameters),
        num_layers=config.num_layers,
        multi_query_group_num=config.multi_query_group_num,
        kv_channels=config.kv_channels,
        base_model_name=base_model_name,
    )


def _embedding(parameters: Mapping[str, torch.Tensor], source: Path) -> torch.Tensor:
    embedding = parameters.get("embedding.weight")
    if embedding is None or embedding.ndim != 2:
        raise ValueError(f"{source} has no two-dimensional {PREFIX_KEY}embedding.weight; the prefix is incomplete.")
    return embedding


def _has_projection(parameters: Mapping[str, torch.Tensor]) -> bool:
    return any(name.startswith("trans.") for name in parameters)


def _is_prefix_key(name: str) -> bool:
    return name.startswith(PREFIX_KEY)


def _prefix_parameters(tensors: Mapping[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    parameters = {key.removeprefix(PREFIX_KEY): value for key, value in tensors.items() if _is_prefix_key(key)}
    _check_finite(parameters, source)
    return parameters


def _check_finite(parameters: Mapping[str, torch.Tensor], source: Path) -> None:
    for name, value in parameters.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: {name} holds numbers that are not finite; its training has diverged.")
