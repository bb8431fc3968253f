"""First values of a prefix: random, those of real tokens, or those of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMPreTrainedModel
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.formats import read_prefix

PrefixInit = Literal["data", "text", "small", "official"]
PREFIX_INITS = get_args(PrefixInit)
_SMALL_STD = 0.02


def init_prefix(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    method: PrefixInit,
    *,
    text: str | None = None,
    examples: Sequence[dict[str, list[int]]] = (),
    seed: int = 42,
) -> None:
    """Sets the trainable prefix to its first values.

    `official` is the official code's N(0, 1) table, `small` the same with a standard deviation of 0.02. `text` and
    `data` take the keys and values that the base computes for real tokens, so that training starts near the base's
    own behaviour: those of a given text, repeated or cut to `pre_seq_len`, or of the training rows, each to its end,
    as many as fit. Starting from real tokens learns fastest in our measurements (docs/measurements.md).

    Args:
        text: for `text`.
        examples: rows with `input_ids`, for `data`.
        seed: of the choice of rows.

    Raises:
        ValueError: if the method is unknown, or has no text or rows to work with.
    """
    encoder = model.transformer.prefix_encoder
    if method == "official":
        return
    if method == "small":
        with torch.no_grad():
            (encoder.trans[2] if encoder.prefix_projection else encoder.embedding).weight.mul_(_SMALL_STD)
        return
    model.init_prefix_from_ids(
        first_ids(tokenizer, method, encoder.pre_seq_len, text=text, examples=examples, seed=seed)
    )


def first_ids(
    tokenizer: ChatGLMTokenizer,
    method: str,
    length: int,
    *,
    text: str | None = None,
    examples: Sequence[dict[str, list[int]]] = (),
    seed: int = 42,
) -> torch.Tensor:
    """The tokens from which a prefix or prompt is initialised, int64 `[length]`.

    Args:
        method: `text` or `data`; the rest as in `init_prefix`.

    Raises:
        ValueError: if the method is another one, or has no text or rows to work with.
    """
    if method == "text":
        ids = tokenizer.encode(text or "", add_special_tokens=False)
        if not ids:
            raise ValueError("The text to start the prefix from has no tokens.")
        ids = ids * -(-length // len(ids))
    elif method == "data":
        ids = _ids_of_rows(examples, length, seed)
    else:
        raise ValueError(f"Unknown prefix_init {method!r}; there are {', '.join(PREFIX_INITS)}.")
    return torch.tensor(ids[:length])


def init_from_checkpoint(
    model: ChatGLMPreTrainedModel,
    path: str,
    task: str | None = None,
    head: str | None = None,
    labels: Sequence[str] | None = None,
) -> bool:
    """Sets the trainable prefix to the values of a checkpoint of this kit, the official code or PEFT.

    Args:
        task, head, labels: of the model. A head that was trained for exactly these is loaded, too.

    Returns:
        Whether the head was loaded.

    Raises:
        FileNotFoundError, ValueError: as `load_prefix`.
    """
    checkpoint = read_prefix(path, model.config.prefix_shape)
    found = checkpoint.metadata if task is None else checkpoint.metadata.of_task(task)
    with_head = labels is not None and (found.task, found.head, found.labels) == (task, head, list(labels))
    if with_head:
        model.load_prefix(checkpoint, task=task)
    else:
        model.base_model.load_prefix(checkpoint)
    return with_head


def _ids_of_rows(examples: Sequence[dict[str, list[int]]], length: int, seed: int) -> list[int]:
    if not examples:
        raise ValueError("prefix_init data needs training rows.")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    while len(ids) < length:
        for index in order:
            ids += examples[index]["input_ids"]
            if len(ids) >= length:
                break
    return ids
