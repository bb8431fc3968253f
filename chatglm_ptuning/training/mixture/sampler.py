"""The order of rows in a mixture of tasks: the rows of a step belong to one task."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from chatglm_ptuning.training.sampler import EpochSampler

_PASSES = 1000
"""Maximum number of passes over a small task within an epoch, each in another order."""


class MixtureSampler(Sampler[int]):
    """Draws a task for every step, and its next rows (MT-DNN, Liu et al. 2019, algorithm 1).

    A step, accumulation and all processes included, is of one task: so its loss is that of the task alone, and the
    rows do not depend on how many processes share them. An epoch has as many steps as all rows fill; a task that is
    drawn more often than its rows last goes on with another order of them. Seed and epoch alone decide.

    Args:
        lengths: of every row in tokens, for each task; indices count through all tasks.
        probabilities: of the tasks.
        batch_size: rows of one step on all devices, accumulation included.
        seed: of the whole run.
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
