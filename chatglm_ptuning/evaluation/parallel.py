"""Answers to many prompts by several processes: each generates a share, and all of them get all answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import distributed

from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.model.zero3 import gathering_modules

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


def generate_answers_together(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Mapping[str, Any]],
    *,
    under_engine: bool = False,
    **settings: Any,
) -> list[str]:
    """As `generate_answers`, with the examples shared among the processes of `torch.distributed`, if there are several.

    Process `r` of `n` takes the examples `r`, `r + n`, ... Where they do not come out even it takes one of its own
    twice, as with a partitioned base (ZeRO-3) all processes have to compute equally often.

    Args:
        under_engine: a DeepSpeed engine manages the model already (it has been trained).
    """
    with nullcontext() if under_engine else gathering_modules(model):
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return generate_answers(model, tokenizer, examples, **settings)
        world, rank = distributed.get_world_size(), distributed.get_rank()
        places = list(range(rank, len(examples), world))
        share = [examples[place] for place in places] or [examples[0]]
        share += share[:1] * (-(-len(examples) // world) - len(share))
        progress = settings.pop("progress", True) and rank == 0
        mine = generate_answers(model, tokenizer, share, progress=progress, **settings)
        gathered: list[list[tuple[int, str]] | None] = [None] * world
        distributed.all_gather_object(gathered, list(zip(places, mine, strict=False)))
    answers = dict(pair for part in gathered for pair in part or ())
    return [answers[place] for place in range(len(examples))]
