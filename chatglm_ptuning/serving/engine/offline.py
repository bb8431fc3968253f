"""Answers a given list of prompts in the caller's thread, without a worker, a queue or a bank of prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils import logging

from chatglm_ptuning.serving.engine.passes import make_cache
from chatglm_ptuning.serving.engine.prefixes import RowPrefix
from chatglm_ptuning.serving.engine.request import EngineError, Generation, SamplingSettings
from chatglm_ptuning.serving.engine.rows import Request
from chatglm_ptuning.serving.engine.scheduler import Scheduler

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

logger = logging.get_logger(__name__)

_PREFILL_CHUNK = 2048


@torch.no_grad()
def answer_all(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingSettings],
    prefixes: Sequence[RowPrefix],
    slots: int,
) -> Iterator[tuple[int, list[int]]]:
    """Answers all prompts, the longest first, and yields each answer as soon as it ends.

    Nothing limits the tokens of a prompt but the memory, which is allocated for the longest.

    Args:
        model: a base that has no `obstacle`, in evaluation mode. It must not be trained before the last answer.
        prompts: ids, at least one each.
        settings, prefixes: for each prompt.
        slots: how many prompts are answered at a time.

    Yields:
        The place of the prompt, and the ids of its answer without a stop id.

    An answer ends, with a warning, where the base's scores are not finite.
    """
    if not prompts:
        return
    lengths = [
        prefix.length + len(prompt) + own.max_new_tokens
        for prompt, own, prefix in zip(prompts, settings, prefixes, strict=True)
    ]
    slots = min(slots, len(prompts))
    scheduler = Scheduler(model, make_cache(model, slots, max(lengths)), _PREFILL_CHUNK)
    scheduler.reset()
    waiting = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    running: dict[int, Generation] = {}
    while waiting or running:
        while waiting and scheduler.table.running < slots:
            place = waiting.pop()
            prompt = np.array(prompts[place], np.int64)
            running[place] = Generation(len(prompt))
            scheduler.admit(Request(prompt, settings[place], prefixes[place], running[place]))
        scheduler.step()
        for place in [place for place, generation in running.items() if generation.finish_reason is not None]:
            yield place, _ids_of(running.pop(place))


def _ids_of(generation: Generation) -> list[int]:
    ids = []
    try:
        for token in generation:
            ids.append(token.id)
    except EngineError as error:
        logger.warning_once(f"{error} The answer ends here.")
    return ids
