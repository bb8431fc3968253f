"""A prefix checkpoint of any format in memory: its tensors and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from chatglm_ptuning.prefix.shape import PrefixShape

PREFIX_KEY = "transformer.prefix_encoder."
"""In front of every parameter of the prefix encoder, in this kit's files as in the official ones."""
HEADS_KEY = "heads."
"""In front of a task's name and the parameters of its head, where several tasks share a prefix."""


@dataclass(frozen=True)
class PrefixMetadata:
    """The content of `prefix_config.json`.

    Attributes:
        base_fingerprint: see `fingerprint_of`; None if the base is unknown (the official format and PEFT's).
        chat_format: chat format of the training data.
        task: what it was trained for, in the user's words.
        training: a summary of the training run.
        head: kind of the head trained beside it (`sequence_classification`, ...); None for the language model.
        labels: labels of the head's outputs, in their order.
        tasks: if several tasks share the prefix, each task's `head` and `labels` by its name.
        trained: False if it was saved untrained.
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

    @classmethod
    def of_parameters(
        cls,
        parameters: Mapping[str, torch.Tensor],
        source: Path,
        shape: PrefixShape,
        base_model_name: str | None = None,
    ) -> PrefixMetadata:
        """The metadata that follow from the parameters, for formats that record no others.

        Raises:
            ValueError: naming the file, if the parameters are incomplete or do not fit the base.
        """
        pre_seq_len, kv_size = embedding_of(parameters, source).shape
        if kv_size != shape.kv_size:
            raise ValueError(
                f"{source} does not fit this base: each virtual token has {kv_size} numbers, the base needs "
                f"{shape.kv_size} ({shape.num_layers} layers x 2 x {shape.multi_query_group_num} groups x "
                f"{shape.kv_channels} channels)."
            )
        return cls(pre_seq_len, has_projection(parameters), *shape.sizes, base_model_name=base_model_name)

    @property
    def shape(self) -> PrefixShape:
        """The sizes that the base must have."""
        return PrefixShape(self.num_layers, self.multi_query_group_num, self.kv_channels)

    def of_task(self, task: str) -> PrefixMetadata:
        """The metadata for one of the tasks that share the prefix; unchanged if no such task does."""
        if task not in self.tasks:
            return self
        return replace(self, task=task, head=self.tasks[task]["head"], labels=self.tasks[task].get("labels"))


@dataclass(frozen=True)
class PrefixCheckpoint:
    """A prefix in this kit's convention: its keys are for tokens whose positions start at 0.

    Attributes:
        source: the file with the weights, for messages.
        parameters: the prefix encoder's parameters by their names in it (`embedding.weight`, `trans.0.weight`, ...).
        heads: parameters of the heads trained beside the prefix, by their full names.

    Raises:
        ValueError: naming the file, if a parameter has NaN or infinite numbers.
    """

    source: Path
    metadata: PrefixMetadata
    parameters: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.parameters.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{self.source}: {name} has numbers that are not finite; its training has diverged.")

    @property
    def tasks_with_head(self) -> list[str]:
        """The tasks, of those that share the prefix, that have a linear head in it."""
        return [
            task for task in self.metadata.tasks if any(key.startswith(f"{HEADS_KEY}{task}.") for key in self.heads)
        ]

    @property
    def generates(self) -> bool:
        """Whether it, or a task that shares it, was trained to generate text, without a linear head."""
        return not self.heads or len(self.tasks_with_head) < len(self.metadata.tasks)

    def of_task(self, task: str, head_name: str) -> PrefixCheckpoint:
        """The prefix with the head of one of the tasks that share it; unchanged for a prefix of one task.

        Args:
            head_name: name of the head in the model.
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


def embedding_of(parameters: Mapping[str, torch.Tensor], source: Path) -> torch.Tensor:
    """The table of a prefix, `[pre_seq_len, kv_size]`.

    Raises:
        ValueError: naming the file, if there is none.
    """
    embedding = parameters.get("embedding.weight")
    if embedding is None or embedding.ndim != 2:
        raise ValueError(f"{source} has no two-dimensional {PREFIX_KEY}embedding.weight; the prefix is incomplete.")
    return embedding


def has_projection(parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether the table goes through a projection."""
    return any(name.startswith("trans.") for name in parameters)


def is_prefix_key(name: str) -> bool:
    """Whether a parameter of a checkpoint belongs to the prefix encoder."""
    return name.startswith(PREFIX_KEY)


def prefix_parameters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prefix encoder's parameters among those of a checkpoint, under their names in the encoder."""
    return {key.removeprefix(PREFIX_KEY): value for key, value in tensors.items() if is_prefix_key(key)}
