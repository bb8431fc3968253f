"""Padding of batches against tensors written down by hand."""

from __future__ import annotations

import pytest
import torch

from chatglm_ptuning.data.collate import PaddingCollator

EXAMPLES = [{"input_ids": [5, 0, 7], "labels": [-100, 0, 7]}, {"input_ids": [8], "labels": [8], "reference": "八"}]


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, list[list[int]]]:
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_pads_on_the_right_and_keeps_the_pad_id_where_it_is_real():
    assert as_lists(PaddingCollator(0)(EXAMPLES)) == {
        "input_ids": [[5, 0, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "labels": [[-100, 0, 7], [8, -100, -100]],
    }


def test_pads_on_the_left():
    examples = [{"input_ids": example["input_ids"]} for example in EXAMPLES] + [{"input_ids": [3, 4]}]
    assert as_lists(PaddingCollator(9, "left")(examples)) == {
        "input_ids": [[5, 0, 7], [9, 9, 8], [9, 3, 4]],
        "attention_mask": [[1, 1, 1], [0, 0, 1], [0, 1, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0], [0, 0, 1]],
    }


def test_refuses_what_does_not_fit_together():
    with pytest.raises(ValueError, match=r"example 1 .* 1 ids .* 0 labels"):
        PaddingCollator(0)([EXAMPLES[0], {"input_ids": [8]}])
    with pytest.raises(ValueError, match=r"example 0 .* 2 ids .* 1 labels"):
        PaddingCollator(0)([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match=r"padding_side='both' .*'left' or 'right'"):
        PaddingCollator(0, "both")
