"""Which class of model a task needs, and whether a prefix was trained for the same labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatglm_ptuning.data.tasks.encode import ANSWERING_HEADS, head_of, label_names
from chatglm_ptuning.data.tasks.schema import Task
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.modeling_heads import HEAD_CLASSES
from chatglm_ptuning.prefix.checkpoint import PrefixMetadata, read_prefix


def model_settings(task: Task, head: str) -> dict[str, Any]:
    """What `load_model` is to be told: the class, and what the outputs of a linear head stand for."""
    settings: dict[str, Any] = {"model_class": HEAD_CLASSES[head]}
    names = label_names(task, head)
    if names is not None:
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    return settings


def recorded_metadata(prefix: str | Path, base: str, hub: str = "hf", revision: str | None = None) -> PrefixMetadata:
    """What a prefix checkpoint says of itself, read before the base's weights are.

    Raises:
        FileNotFoundError, ValueError: as `read_prefix` and `find_base`.
    """
    config = ChatGLMConfig.from_pretrained(find_base(base, hub, revision, weights=False))
    return read_prefix(prefix, config).metadata


def recorded_head(metadata: PrefixMetadata, task: Task, asked: str | None, source: str | Path) -> str:
    """The head to use with a prefix: the one that was trained beside it, or the language model.

    Raises:
        ValueError: if another one is asked for, if it cannot solve the task, or if its labels are not the task's; the
            message names both sides.
    """
    metadata = metadata.of_task(task.name)
    if metadata.head is None or metadata.head in ANSWERING_HEADS:
        answering = [head for head in task.heads if head in ANSWERING_HEADS]
        head = asked or metadata.head or (task.head if task.head in ANSWERING_HEADS else (answering or [task.head])[0])
    else:
        head = metadata.head
    if asked is not None and asked != head:
        raise ValueError(f"--head {asked}: the prefix in {source} was trained with the head {head}.")
    if head not in task.heads:
        raise ValueError(
            f"The prefix in {source} was trained with the head {head}, for {metadata.task or 'an unnamed task'}; "
            f"{task.name} takes {' or '.join(task.heads)}."
        )
    head = head_of(task, head)
    names = label_names(task, head)
    if names is not None and metadata.labels is None:
        raise ValueError(
            f"The prefix in {source} has no linear head for {task.name}{_of_tasks(metadata)}, and --head {head} needs "
            f"one: train it with --task {task.name} "
            f"--head {head}, or score it by --head generation where the task takes that."
        )
    if names is not None and list(names) != list(metadata.labels or ()):
        raise ValueError(
            f"The head in {source} was trained for the labels {_listed(metadata.labels or ())} (task {metadata.task}); "
            f"{task.name} has {_listed(names)}."
        )
    return head


def _of_tasks(metadata: PrefixMetadata) -> str:
    return f" (it is shared by {', '.join(metadata.tasks)})" if metadata.tasks else ""


def _listed(names: Any) -> str:
    shown = list(names)
    return ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")
