"""Shares examples among processes: each takes a part, and all of them get all results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from chatglm_ptuning.model.zero3 import gathering_modules

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel

Item = TypeVar("Item")
Result = TypeVar("Result")


def process_count() -> int:
    """The number of processes of `torch.distributed`, 1 without it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the process that prints and writes."""
    return process_count() == 1 or distributed.get_rank() == 0


def print_once(text: str) -> None:
    """Prints in the first process only."""
    if is_first_process():
        print(text)


@contextmanager
def joined_processes() -> Iterator[None]:
    """Inside, the processes that torchrun started form a process group, and each has its own accelerator."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or process_count() > 1:
        yield
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK") or 0))
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def do_together(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Sequence[Result]],
    model: ChatGLMPreTrainedModel,
    under_engine: bool = False,
) -> list[Result]:
    """The result of every item, in order; several processes share the items.

    Process `r` of `n` takes the items `r`, `r + n`, ... If the division leaves a remainder, it takes one of its items
    twice: with a partitioned base (ZeRO-3) all processes must compute equally often. If an item may take several
    passes of the model, `work` must ensure that by `most_of_processes`.

    Args:
        work: computes a result for each of its items.
        under_engine: whether a DeepSpeed engine manages the model (after training).
    """
    with nullcontext() if under_engine else gathering_modules(model):
        world = process_count()
        if world == 1:
            return list(work(items))
        rank = distributed.get_rank()
        places = list(range(rank, len(items), world))
        share = [items[place] for place in places] or [items[0]]
        share += share[:1] * (-(-len(items) // world) - len(share))
        gathered: list[list[tuple[int, Result]] | None] = [None] * world
        distributed.all_gather_object(gathered, list(zip(places, work(share), strict=False)))
    results = dict(pair for part in gathered for pair in part or ())
    return [results[place] for place in range(len(items))]
