"""The order of training rows: reproducible from seed and epoch alone, so that a resumed run sees the same batches."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from chatglm_ptuning.data.dataset import lengths_of
from chatglm_ptuning.model.losses import IGNORED_LABEL

SAMPLING_STRATEGIES = ("group_by_length", "random", "sequential")
TASK_KEY = "task"
"""In the rows of several tasks: the one a row belongs to."""
_FILLING_TOKENS = 2  # of a row that fills up a batch: the fewest with a token to predict


class EpochSampler(Sampler[int]):
    """The rows of an epoch, in another order every epoch.

    transformers' own LengthGroupedSampler draws from the global random state, which a resumed run enters elsewhere.

    Args:
        lengths: of every row, in tokens.
        batch_size: rows of one step on all devices, accumulation included: so the order, and with it every step's
            rows, does not depend on how many processes share them.
        seed: of the whole run.
        strategy: `group_by_length` (rows of similar length next to one another), `random` or `sequential`.
        multiple_of: go on with the indices after the last row, until there are a multiple of so many. `PaddedRows`
            has rows without anything to learn there.

    Raises:
        ValueError: for another strategy.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        strategy: str = "group_by_length",
        multiple_of: int = 1,
    ) -> None:
        if strategy not in SAMPLING_STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(SAMPLING_STRATEGIES)}, got {strategy!r}.")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.strategy = strategy
        self.total = -(-len(self.lengths) // multiple_of) * multiple_of
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = len(self.lengths)
        if self.strategy == "group_by_length":
            order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        elif self.strategy == "random":
            order = torch.randperm(rows, generator=generator).tolist()
        else:
            order = list(range(rows))
        return iter(order + list(range(rows, self.total)))


class MixedRows(Dataset):
    """The rows of several tasks one behind the other, each with the task that it belongs to.

    Attributes:
        of_task: the rows of every task, by its name.
        sizes: how many they are.
    """

    def __init__(self, of_task: Mapping[str, Any]) -> None:
        self.of_task = of_task
        self.sizes = {name: len(rows) for name, rows in of_task.items()}
        self._ends = list(itertools.accumulate(self.sizes.values()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        place = bisect_right(self._ends, index)
        name = list(self.of_task)[place]
        return {TASK_KEY: name, **self.of_task[name][index - self._ends[place] + self.sizes[name]]}


class PaddedRows(Dataset):
    """Rows, and after them as many without anything to learn as make a multiple of `multiple_of`.

    With them every process gets equally many batches, and none of the rows twice, so that sums over the rows are those
    of a single process.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], multiple_of: int) -> None:
        self.rows = rows
        self.total = -(-len(rows) // multiple_of) * multiple_of

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        if index >= self.total:
            raise IndexError(index)
        return nothing_to_learn_like(self.rows[0])


def nothing_to_learn_like(row: dict[str, Any]) -> dict[str, Any]:
    """The shortest row of the same columns that adds nothing to any loss."""
    filling: dict[str, Any] = {"input_ids": row["input_ids"][:_FILLING_TOKENS]}
    filling |= {name: row[name] for name in (TASK_KEY,) if name in row}
    filling |= {name: IGNORED_LABEL for name in ("start_positions", "end_positions") if name in row}
    labels = row.get("labels")
    if isinstance(labels, int):
        filling["labels"] = IGNORED_LABEL
    elif labels is not None and isinstance(labels[0], float):
        filling["labels"] = [float(IGNORED_LABEL)] * len(labels)
    elif labels is not None:
        filling["labels"] = [IGNORED_LABEL] * len(filling["input_ids"])
    return filling


def row_lengths(dataset: Any) -> list[int]:
    """Tokens of every row, those that fill it up included, without reading prepared rows."""
    if isinstance(dataset, MixedRows):
        return [length for rows in dataset.of_task.values() for length in lengths_of(rows)]
    if not isinstance(dataset, PaddedRows):
        return lengths_of(dataset)
    lengths = row_lengths(dataset.rows)
    return lengths + [_FILLING_TOKENS] * (len(dataset) - len(lengths))
