"""Whether a prefix fits the model that it is loaded into: sizes, base and head, in one check."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.prefix.shape import PrefixShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipient:
    """The model that a prefix is loaded into.

    Attributes:
        model: name of its class, for messages.
        base_name: the name or path that its base was loaded from; None if it has none.
        fingerprint: computes the fingerprint of its base.
        heads: sizes of the parameters trained beside a prefix, by their full names; none in the language model. None if
            it is the base alone, which has no use for heads.
        head_kind: what its head is for (`sequence_classification`, ...); None if it does not matter.
        task: whose head is wanted, of a prefix that several tasks share.
    """

    model: str
    shape: PrefixShape
    base_name: str | None
    fingerprint: Callable[[], dict[str, Any]]
    heads: Mapping[str, torch.Size] | None = None
    head_kind: str | None = None
    task: str | None = None


def check_fits(checkpoint: PrefixCheckpoint, recipient: Recipient) -> None:
    """Checks that a prefix fits the sizes, the base and the head of a model.

    Warns of a prefix that does not say which base it was trained on, and of a head that the model does not use.

    Raises:
        ValueError: naming the file and both sides of what does not fit.
    """
    _check_base(checkpoint, recipient)
    if recipient.heads is not None:
        _check_heads(checkpoint, recipient, recipient.heads)


def _check_base(checkpoint: PrefixCheckpoint, recipient: Recipient) -> None:
    theirs, ours = checkpoint.metadata.shape.sizes, recipient.shape.sizes
    if theirs != ours:
        raise ValueError(
            f"{checkpoint.source} does not fit this base: the prefix is for (num_layers, multi_query_group_num, "
            f"kv_channels) = {theirs}, the base has {ours}."
        )
    recorded = checkpoint.metadata.base_fingerprint
    if recorded is None:
        logger.warning(
            f"{checkpoint.source} does not say which base it was trained on: only its sizes could be checked."
        )
        return
    what = difference(recorded, recipient.fingerprint())
    if what is not None:
        raise ValueError(
            f"{checkpoint.source} was trained on another base: on "
            f"{checkpoint.metadata.base_model_name or 'an unnamed one'}, and this one is "
            f"{recipient.base_name or 'unnamed'} ({what})."
        )


def _check_heads(checkpoint: PrefixCheckpoint, recipient: Recipient, ours: Mapping[str, torch.Size]) -> None:
    source, model = checkpoint.source, recipient.model
    trained, shared = checkpoint.metadata.head, checkpoint.metadata.tasks
    if recipient.head_kind is not None and shared and recipient.task not in shared:
        what = "" if recipient.task is None else f", not by {recipient.task}"
        raise ValueError(
            f"The prefix in {source} is shared by {', '.join(shared)}{what}. Say whose head is meant: "
            "load_prefix(path, task=...)."
        )
    if recipient.head_kind is not None and trained not in (None, recipient.head_kind):
        raise ValueError(
            f"{source} was trained with the head {trained} (task {checkpoint.metadata.task}); {model} has one for "
            f"{recipient.head_kind}."
        )
    missing = [name for name in ours if name not in checkpoint.heads]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}: it was not trained with the head of {model}. To start from its "
            "prefix alone, call load_prefix on the model's base_model."
        )
    for name, size in ours.items():
        found = checkpoint.heads[name].shape
        if found != size:
            raise ValueError(
                f"{source} has {name} of size {tuple(found)}, {model} here has {tuple(size)}: the number of labels "
                "differs."
            )
    unused = [name for name in checkpoint.heads if name not in ours]
    if unused:
        logger.warning(f"{source} also has {', '.join(unused)}, which {model} does not use.")
