"""Many rows through a model, in batches: what writing, scoring candidates and linear heads have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from chatglm_ptuning.model.zero3 import most_of_processes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module is as it was."""
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
    """The places of the rows, the longest first, so that a batch that does not fit in memory shows at once.

    Of several processes that share a partitioned base, each gets as many batches as the one with the most: at the end
    its last one again.

    Args:
        what: what is done, for a progress bar on stderr.
        progress: whether to show it.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    with tqdm(total=len(rows), desc=what, delay=3, disable=not progress) as bar:
        for turn in range(most_of_processes(model, len(batches))):
            yield batches[min(turn, len(batches) - 1)]
            if turn < len(batches):
                bar.update(len(batches[turn]))
