"""Runs rows through a model in batches, for generation, candidates and linear heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from chatglm_ptuning.model.zero3 import most_of_processes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards the mode of every module is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def in_batches(
    model: nn.Module, rows: Sequence[Sequence[Any]], size: int, what: str, progress: bool = True
) -> Iterator[list[int]]:
    """The places of the rows of each batch, the longest rows first, so that a lack of memory shows at once.

    With a partitioned base (ZeRO-3) all processes get equally many batches; a process repeats its last one if needed.

    Args:
        what: label of the progress bar on stderr.
        progress: whether to show it.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    with tqdm(total=len(rows), desc=what, delay=3, disable=not progress) as bar:
        for turn in range(most_of_processes(model, len(batches))):
            yield batches[min(turn, len(batches) - 1)]
            if turn < len(batches):
                bar.update(len(batches[turn]))
