"""Checks whether a prefix fits the model that it is loaded into: sizes, base and head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.prefix.shape import PrefixShape

logger = logging.getLogger(__name__)


def check_base(
    checkpoint: PrefixCheckpoint, shape: PrefixShape, base_name: str | None, fingerprint: Callable[[], dict[str, Any]]
) -> None:
    """Checks that a prefix fits the sizes of a base and was trained on it.

    Logs a warning if the checkpoint does not record its base.

    Args:
        shape: sizes of the base.
        base_name: name or path of the base; None if it has none.
        fingerprint: computes the fingerprint of the base; called only if the sizes fit.

    Raises:
        ValueError: naming the file and both sides of the mismatch.
    """
    theirs, ours = checkpoint.metadata.shape.sizes, shape.sizes
    if theirs != ours:
        raise ValueError(
            f"{checkpoint.source} does not fit this base: the prefix is for (num_layers, multi_query_group_num, "
            f"kv_channels) = {theirs}, the base has {ours}."
        )
    recorded = checkpoint.metadata.base_fingerprint
    if recorded is None:
        logger.warning(f"{checkpoint.source} does not record its base: only its sizes could be checked.")
        return
    what = difference(recorded, fingerprint())
    if what is not None:
        raise ValueError(
            f"{checkpoint.source} was trained on another base: on "
            f"{checkpoint.metadata.base_model_name or 'an unnamed one'}, and this one is {base_name or 'unnamed'} "
            f"({what})."
        )


def check_heads(
    checkpoint: PrefixCheckpoint,
    model: str,
    heads: Mapping[str, torch.Size],
    head_kind: str | None = None,
    task: str | None = None,
) -> None:
    """Checks that a prefix has the head of a model.

    Logs a warning about heads in the checkpoint that the model does not use.

    Args:
        model: class name of the model, for messages.
        heads: shapes of the model's head parameters by their full names; empty for the language model.
        head_kind: kind of the model's head (`sequence_classification`, ...); None skips the check of the kind.
        task: the task whose head is loaded, if several tasks share the prefix.

    Raises:
        ValueError: naming the file and both sides of the mismatch.
    """
    source = checkpoint.source
    trained, shared = checkpoint.metadata.head, checkpoint.metadata.tasks
    if head_kind is not None and shared and task not in shared:
        what = "" if task is None else f", not by {task}"
        raise ValueError(
            f"The prefix in {source} is shared by {', '.join(shared)}{what}. Choose one of them: "
            "load_prefix(path, task=...)."
        )
    if head_kind is not None and trained not in (None, head_kind):
        raise ValueError(
            f"{source} was trained with the head {trained} (task {checkpoint.metadata.task}); {model} has one for "
            f"{head_kind}."
        )
    missing = [name for name in heads if name not in checkpoint.heads]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}: it was not trained with the head of {model}. To start from its "
            "prefix alone, call load_prefix on the model's base_model."
        )
    for name, size in heads.items():
        found = checkpoint.heads[name].shape
        if found != size:
            raise ValueError(
                f"{source} has {name} of size {tuple(found)}, {model} here has {tuple(size)}: the number of labels "
                "differs."
            )
    unused = [name for name in checkpoint.heads if name not in heads]
    if unused:
        logger.warning(f"{source} also has {', '.join(unused)}, which {model} does not use.")
