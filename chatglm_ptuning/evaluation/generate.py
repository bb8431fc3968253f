"""Generates the answers of a model to many prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.evaluation.batches import evaluating, in_batches
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch
from chatglm_ptuning.serving.engine.offline import answer_all
from chatglm_ptuning.serving.engine.passes import obstacle
from chatglm_ptuning.serving.engine.prefixes import RowPrefix
from chatglm_ptuning.serving.engine.request import SamplingSettings

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


@torch.no_grad()
def generate_answers(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    prefix: PrefixArgument = None,
    progress: bool = True,
) -> list[str]:
    """Generates one answer per prompt, by default without sampling; the answers are in the order of the prompts.

    Only the settings given here apply: `generation_config.json` of the base, which may enable sampling or limit the
    total length, is ignored.

    The serving engine generates the answers: a prompt takes the place of another whose answer has ended. `generate`
    of transformers, batch by batch, does what the engine does not: beams, bases that ZeRO-3 has partitioned, and
    attention implementations without a mask. Where the base's scores are NaN or infinite, an answer of the engine
    ends, with a warning.

    Args:
        prompts: ids of the prompts alone.
        batch_size: how many prompts are answered at a time.
        max_new_tokens: most tokens of an answer, without its prompt.
        temperature, top_p: of sampling; None for 1.
        prefix: as for `generate`, for all prompts or one for each; by default the selected one.
        progress: whether to show a bar on stderr.

    Returns:
        The answers as the chat format's `answer_text` gives them: a tool call as name, newline and call.

    Raises:
        ValueError: if a number is out of range, a prompt is empty, sampling settings come without `do_sample`, the
            prefix is untrained, or the prefixes are for another number of prompts.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"Prompt {place} (counted from 0) has no tokens.")
    if not do_sample and (temperature is not None or top_p is not None):
        raise ValueError(f"temperature={temperature} and top_p={top_p} are for sampling: set do_sample=True with them.")
    settings = SamplingSettings(
        max_new_tokens,
        temperature=(1.0 if temperature is None else temperature) if do_sample else 0.0,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=repetition_penalty,
        stop_ids=tuple(tokenizer.chat.stop_ids),
    )
    prefix = model.resolve_prefix(prefix)
    prefix.check_rows(len(prompts))
    model.check_prefix_is_trained(prefix)
    answers = [""] * len(prompts)
    with evaluating(model):
        if num_beams == 1 and obstacle(model) is None:
            found = _by_engine(model, prompts, prefix, settings, batch_size, progress)
        else:
            found = _by_generate(model, tokenizer, prompts, prefix, settings, batch_size, num_beams, progress)
        for row, ids in found:
            answers[row] = tokenizer.chat.answer_text(ids)
    return answers


def _by_engine(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    prefix: PrefixBatch,
    settings: SamplingSettings,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[int, list[int]]]:
    """The row of each prompt with the ids of its answer."""
    row_settings = [settings] * len(prompts)
    if settings.temperature:
        seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
        row_settings = [replace(settings, seed=seed) for seed in seeds]
    if prefix.rows is None:
        row_prefixes = [RowPrefix.of(prefix)] * len(prompts)
    else:
        places = {owner: row for row, owner in enumerate(prefix.owner)}
        by_owner = {owner: RowPrefix.of(prefix.select([row])) for owner, row in places.items()}
        row_prefixes = [by_owner[owner] for owner in prefix.owner]
    found = answer_all(model, prompts, row_settings, row_prefixes, batch_size)
    yield from tqdm(found, desc="generating", total=len(prompts), delay=3, disable=not progress)


def _by_generate(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Sequence[int]],
    prefix: PrefixBatch,
    settings: SamplingSettings,
    batch_size: int,
    num_beams: int,
    progress: bool,
) -> Iterator[tuple[int, list[int]]]:
    """As `_by_engine`; ids behind a stop id are padding."""
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=num_beams,
        do_sample=settings.temperature > 0,
        repetition_penalty=settings.repetition_penalty,
        **(sampling if settings.temperature > 0 else {}),
        eos_token_id=list(settings.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    pad = PaddingCollator(tokenizer.pad_token_id, "left")
    with _without_own_settings(model):
        for rows in in_batches(model, prompts, batch_size, "generating", progress):
            batch = pad([{"input_ids": list(prompts[row])} for row in rows])
            del batch["position_ids"]  # `generate` computes its own
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            output = model.generate(**inputs, prefix=prefix.select(rows), generation_config=generation_config)
            yield from zip(rows, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)


@contextmanager
def _without_own_settings(model: ChatGLMForConditionalGeneration) -> Iterator[None]:
    """Inside, the base has no generation settings, which `generate` would use for what its argument leaves open."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
