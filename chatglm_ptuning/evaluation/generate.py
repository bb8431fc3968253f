"""Answers of a model to many prompts, in batches; reproducible unless sampling is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.evaluation.batches import evaluating, in_batches
from chatglm_ptuning.prefix.batch import PrefixArgument

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer


@torch.no_grad()
def generate_answers(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Mapping[str, Any]],
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
    """Generates one answer per prompt, greedily by default.

    The settings are those given here and no others: `generation_config.json` of the base, which may ask for sampling
    or limit the whole length, has no part in it. The answers are in the order of the examples.

    Args:
        examples: each with `input_ids`, the prompt alone, as `ConversationEncoder.prompt` makes them.
        max_new_tokens: tokens of an answer at most, without its prompt.
        temperature: of sampling; None for 1.
        top_p: share of probability to sample from; None for all of it.
        prefix: as for `generate`, for all examples or one for each; by default the selected one.
        progress: whether to show a bar on stderr.

    Returns:
        The answers as the chat format's `answer_text` gives them: a tool call as name, newline and call, in which form
        `ConversationEncoder.prompt` gives the reference.

    Raises:
        ValueError: if a number is out of range, a prompt is empty, sampling settings come without `do_sample`, the
            prefix is untrained, or the prefixes are for another number of examples.
    """
    _check_arguments(examples, batch_size, max_new_tokens, num_beams)
    settings = _generation_settings(
        tokenizer,
        temperature,
        top_p,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=do_sample,
        repetition_penalty=repetition_penalty,
    )
    prefix = model.resolve_prefix(prefix)
    prefix.check_rows(len(examples))
    model.check_prefix_is_trained(prefix)
    pad = PaddingCollator(tokenizer.pad_token_id, "left")
    prompts = [list(example["input_ids"]) for example in examples]
    answers = [""] * len(examples)
    with evaluating(model), _without_own_settings(model):
        for rows in in_batches(model, prompts, batch_size, "generating", progress):
            batch = pad([{"input_ids": prompts[row]} for row in rows])
            del batch["position_ids"]  # `generate` makes its own
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            output = model.generate(**inputs, prefix=prefix.select(rows), generation_config=settings)
            for row, new in zip(rows, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[row] = tokenizer.chat.answer_text(new)
    return answers


def _generation_settings(
    tokenizer: ChatGLMTokenizer, temperature: float | None, top_p: float | None, **settings: Any
) -> GenerationConfig:
    """All settings of `generate`, so that it takes none from elsewhere.

    Raises:
        ValueError: if sampling settings come without `do_sample`.
    """
    if settings["do_sample"]:
        settings |= {
            "temperature": 1.0 if temperature is None else temperature,
            "top_p": 1.0 if top_p is None else top_p,
            "top_k": 0,
        }
    elif temperature is not None or top_p is not None:
        raise ValueError(f"temperature={temperature} and top_p={top_p} are for sampling: set do_sample=True with them.")
    return GenerationConfig(
        **settings, eos_token_id=tokenizer.chat.stop_ids, pad_token_id=tokenizer.pad_token_id, use_cache=True
    )


@contextmanager
def _without_own_settings(model: ChatGLMForConditionalGeneration) -> Iterator[None]:
    """Inside, the base has no generation settings of its own, from which `generate` fills what its argument leaves."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def _check_arguments(
    examples: Sequence[Mapping[str, Any]], batch_size: int, max_new_tokens: int, num_beams: int
) -> None:
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    empty = [index for index, example in enumerate(examples) if not len(example["input_ids"])]
    if empty:
        raise ValueError(f"The prompt of example {empty[0]} (counted from 0) has no tokens.")
