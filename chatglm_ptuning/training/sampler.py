"""The order of training rows, of one task or of a mixture.

It depends on seed and epoch only, so that a resumed run sees the same batches.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from chatglm_ptuning.data.dataset import lengths_of
from chatglm_ptuning.model.losses import IGNORED_LABEL

SamplingStrategy = Literal["group_by_length", "random", "sequential"]
SAMPLING_STRATEGIES = get_args(SamplingStrategy)
TASK_KEY = "task"
"""Key of rows in a mixture: the task that a row belongs to."""
_PADDING_ROW_TOKENS = 2  # the fewest that have a token to predict

_PASSES = 1000
"""Maximum number of passes over a small task within an epoch, each in another order."""


class EpochSampler(Sampler[int]):
    """The rows of an epoch, in another order every epoch.

    transformers' own LengthGroupedSampler draws from the global random state, which differs in a resumed run.

    Args:
        lengths: number of tokens of every row.
        batch_size: number of rows in a step, over all devices and accumulated batches. So the rows of a step do not
            depend on the number of processes.
        strategy: `group_by_length` puts rows of similar length next to one another.
        multiple_of: indices of padding rows (`PaddedRows`) follow the last row, up to a multiple of this number.

    Raises:
        ValueError: for another strategy.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        strategy: SamplingStrategy = "group_by_length",
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


class MixtureSampler(Sampler[int]):
    """Draws a task for every step, and its next rows (MT-DNN, Liu et al. 2019, algorithm 1).

    A step, accumulation and all processes included, is of one task: so its loss is that of the task alone, and the
    rows do not depend on how many processes share them. An epoch has as many steps as all rows fill; a task that is
    drawn more often than its rows last draws them again in another order. Seed and epoch alone decide.

    Args:
        lengths: of every row in tokens, for each task; indices count through all tasks.
        probabilities: of the tasks.
        batch_size: rows of one step on all devices, accumulation included.
        seed: of the run.
        strategy: of the rows of each task, as in `EpochSampler`.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        probabilities: Sequence[float],
        batch_size: int,
        seed: int,
        strategy: str = "group_by_length",
    ) -> None:
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.offsets = [0, *itertools.accumulate(len(rows) for rows in lengths)]
        self.steps = -(-self.offsets[-1] // batch_size)
        self.of_task = [
            EpochSampler(rows, batch_size, seed + number, strategy) for number, rows in enumerate(lengths, 1)
        ]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def tasks_of_steps(self) -> list[int]:
        """The index of the task of each step of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.multinomial(self.probabilities, self.steps, replacement=True, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        rows = [self._rows(number) for number in range(len(self.of_task))]
        return itertools.chain.from_iterable(
            itertools.islice(rows[number], self.batch_size) for number in self.tasks_of_steps()
        )

    def _rows(self, number: int) -> Iterator[int]:
        sampler, offset = self.of_task[number], self.offsets[number]
        for passed in itertools.count():
            sampler.set_epoch(self.epoch * _PASSES + passed)
            yield from (offset + index for index in sampler)


class MixedRows(Dataset):
    """The rows of several tasks, concatenated, each with the name of its task.

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
    """Rows, followed by padding rows with all labels masked, up to a multiple of `multiple_of`.

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
        return masked_row_like(self.rows[0])


def masked_row_like(row: dict[str, Any]) -> dict[str, Any]:
    """A short row with the same columns and all labels masked."""
    filling: dict[str, Any] = {"input_ids": row["input_ids"][:_PADDING_ROW_TOKENS]}
    filling |= {name: row[name] for name in (TASK_KEY,) if name in row}
    filling |= {name: IGNORED_LABEL for name in ("start_positions", "end_positions") if name in row}
    filling |= {name: [] for name in ("teacher_ids", "teacher_logprobs") if name in row}
    labels = row.get("labels")
    if isinstance(labels, int):
        filling["labels"] = IGNORED_LABEL
    elif labels is not None and isinstance(labels[0], float):
        filling["labels"] = [float(IGNORED_LABEL)] * len(labels)
    elif labels is not None:
        filling["labels"] = [IGNORED_LABEL] * len(filling["input_ids"])
    return filling


def row_lengths(dataset: Any) -> list[int]:
    """Number of tokens of every row, padding rows included, without reading cached rows."""
    if isinstance(dataset, MixedRows):
        return [length for rows in dataset.of_task.values() for length in lengths_of(rows)]
    if not isinstance(dataset, PaddedRows):
        return lengths_of(dataset)
    lengths = row_lengths(dataset.rows)
    return lengths + [_PADDING_ROW_TOKENS] * (len(dataset) - len(lengths))
