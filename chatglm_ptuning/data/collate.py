"""Makes the tensors of a batch from rows of different lengths: padded, or packed one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from chatglm_ptuning.model.losses import IGNORED_LABEL

_OF_TEACHER = {"teacher_ids": np.int64, "teacher_logprobs": np.float32}
"""What rows have for each supervised token, if a model is their teacher (`divergence_of_states`)."""


class PaddingCollator:
    """Pads the examples of a batch to the longest of them.

    Args:
        pad_token_id: id on padded positions; it may be the id of a real token (`<unk>` in ChatGLM), because mask and
            labels go by position.
        padding_side: `right` for training, `left` for generation.

    Raises:
        ValueError: for another padding side.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right") -> None:
        if padding_side not in {"left", "right"}:
            raise ValueError(f"padding_side={padding_side!r} must be 'left' or 'right'")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch, int64 on the CPU, every tensor `[batch, seq_len]`.

        - `input_ids`; `attention_mask`, 1 on real tokens; `position_ids`, 0, 1, 2, ... on real tokens and 0 on padding.
        - `labels`, if the examples have them, -100 on padding; `[batch]` if they are numbers, and float32 `[batch,
          num_labels]` if they are lists of floating-point numbers, one for each class of a linear head.
        - `start_positions`, `end_positions`, if the examples have them, `[batch]`.

        Other keys of the examples (`reference`) are left out.

        Raises:
            ValueError: if an example has another number of labels than of ids, or only some examples have labels.
        """
        rows = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": self._pad(rows, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in rows], 0),
            "position_ids": self._pad([range(len(ids)) for ids in rows], 0),
        }
        for name in ("start_positions", "end_positions"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        if any("labels" in example for example in examples):
            batch["labels"] = self._labels(examples)
        return batch

    def _labels(self, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        if all(_is_of_whole_row(example.get("labels")) for example in examples):
            return torch.tensor([example["labels"] for example in examples])
        for index, example in enumerate(examples):
            _check_labels(index, example)
        return self._pad([example["labels"] for example in examples], IGNORED_LABEL)

    def _pad(self, rows: list[Sequence[int]], value: int) -> torch.Tensor:
        length = max(len(row) for row in rows)
        padded = torch.full((len(rows), length), value, dtype=torch.int64)
        for target, row in zip(padded, rows, strict=True):
            place = slice(length - len(row), length) if self.padding_side == "left" else slice(len(row))
            target[place] = torch.as_tensor(row, dtype=torch.int64)
        return padded


class PackingCollator:
    """Rows as arrays, which `pack` lays one after the other; no padding."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, np.ndarray]]]:
        """The batch: `rows`, each with the keys of the example, int64 or float32.

        Where there is a label for each token, that of the first is masked: no position predicts it, and it has no tag,
        because the rows of all tasks begin with a special token.

        Raises:
            ValueError: if an example has another number of labels than of ids, or only some examples have labels.
        """
        return {"rows": [self._row(place, example) for place, example in enumerate(examples)]}

    def _row(self, place: int, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        names = [name for name in ("input_ids", "labels", "start_positions", "end_positions") if name in example]
        row = {name: np.array(example[name], np.float32 if _is_floating(example[name]) else np.int64) for name in names}
        row |= {name: np.array(example[name], dtype) for name, dtype in _OF_TEACHER.items() if name in example}
        if "labels" in row and not _is_of_whole_row(example["labels"]):
            _check_labels(place, example)
            row["labels"][0] = IGNORED_LABEL
        return row


def pack(rows: Sequence[Mapping[str, np.ndarray]], max_tokens: int) -> list[dict[str, Any]]:
    """Rows of a `PackingCollator` as batches of packed sequences (`ChatGLMModel.forward`), on the CPU.

    Args:
        max_tokens: of a batch; a longer row has a batch of its own.

    Returns:
        Batches with `input_ids` `[1, tokens]`, `sequence_lengths`, and what else the rows have. With a label for each
        token these are `labels` `[1, tokens]` and `supervised_positions`; otherwise one entry for each row.
    """
    batches = []
    for places in fit([len(row["input_ids"]) for row in rows], max_tokens):
        own = [rows[place] for place in places]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.concatenate([row["input_ids"] for row in own]))[None],
            "sequence_lengths": [len(row["input_ids"]) for row in own],
        }
        for name in ("labels", "start_positions", "end_positions"):
            if name in own[0] and not has_token_labels(own[0]):
                batch[name] = torch.from_numpy(np.stack([row[name] for row in own]))
        if has_token_labels(own[0]):
            labels = torch.from_numpy(np.concatenate([row["labels"] for row in own]))
            supervised = (labels != IGNORED_LABEL).nonzero().flatten()
            batch |= {"labels": labels[None], "supervised_positions": supervised}
        for name in _OF_TEACHER:
            if name in own[0]:
                batch[name] = torch.from_numpy(np.concatenate([row[name] for row in own]))
        batches.append(batch)
    return batches


def has_token_labels(row: Mapping[str, np.ndarray]) -> bool:
    """Whether a row of a `PackingCollator` has a label for each token."""
    return "labels" in row and row["labels"].ndim == 1 and row["labels"].dtype == np.int64


def fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes items over as few bins as best fit decreasing finds.

    Args:
        lengths: of the items.
        capacity: of a bin; a longer item has a bin of its own.

    Returns:
        The indices of the items in each bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [number for number, left in enumerate(room) if left >= lengths[place]]
        if fitting:
            best = min(fitting, key=room.__getitem__)
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
        bins[best].append(place)
        room[best] -= lengths[place]
    return bins


def _check_labels(index: int, example: Mapping[str, Any]) -> None:
    labels = example.get("labels")
    count = len(labels) if isinstance(labels, Sequence) else 0
    if count != len(example["input_ids"]):
        raise ValueError(
            f"example {index} of the batch has {len(example['input_ids'])} ids and {count} labels; the numbers must be "
            "equal"
        )


def _is_of_whole_row(labels: Any) -> bool:
    """Whether this is a class, or a number for each class, and not a label for each token."""
    return isinstance(labels, int) or _is_floating(labels)


def _is_floating(values: Any) -> bool:
    return isinstance(values, Sequence) and len(values) > 0 and isinstance(values[0], float)
