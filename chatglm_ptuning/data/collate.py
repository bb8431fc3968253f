"""Pads rows of different lengths to the tensors of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatglm_ptuning.model.losses import IGNORED_LABEL


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
            labels = example.get("labels")
            count = len(labels) if isinstance(labels, Sequence) else 0
            if count != len(example["input_ids"]):
                raise ValueError(
                    f"example {index} of the batch has {len(example['input_ids'])} ids and {count} labels; the numbers "
                    "must be equal"
                )
        return self._pad([example["labels"] for example in examples], IGNORED_LABEL)

    def _pad(self, rows: list[Sequence[int]], value: int) -> torch.Tensor:
        length = max(len(row) for row in rows)
        padded = torch.full((len(rows), length), value, dtype=torch.int64)
        for target, row in zip(padded, rows, strict=True):
            place = slice(length - len(row), length) if self.padding_side == "left" else slice(len(row))
            target[place] = torch.as_tensor(row, dtype=torch.int64)
        return padded


def _is_of_whole_row(labels: Any) -> bool:
    """Whether this is a class, or a number for each class, and not a label for each token."""
    if isinstance(labels, Sequence):
        return len(labels) > 0 and isinstance(labels[0], float)
    return isinstance(labels, int)
