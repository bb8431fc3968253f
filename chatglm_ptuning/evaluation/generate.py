"""Generates the answers of a model to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

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

    Args:
        prompts: ids of the prompts alone.
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
    sampling = {"temperature": temperature, "top_p": top_p}
    if do_sample:
        sampling = {name: 1.0 if value is None else value for name, value in sampling.items()} | {"top_k": 0}
    elif temperature is not None or top_p is not None:
        raise ValueError(f"temperature={temperature} and top_p={top_p} are for sampling: set do_sample=True with them.")
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=do_sample,
        repetition_penalty=repetition_penalty,
        **(sampling if do_sample else {}),
        eos_token_id=tokenizer.chat.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    prefix = model.resolve_prefix(prefix)
    prefix.check_rows(len(prompts))
    model.check_prefix_is_trained(prefix)
    pad = PaddingCollator(tokenizer.pad_token_id, "left")
    answers = [""] * len(prompts)
    with evaluating(model), _without_own_settings(model):
        for rows in in_batches(model, prompts, batch_size, "generating", progress):
            batch = pad([{"input_ids": list(prompts[row])} for row in rows])
            del batch["position_ids"]  # `generate` computes its own
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            output = model.generate(**inputs, prefix=prefix.select(rows), generation_config=settings)
            for row, new in zip(rows, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[row] = tokenizer.chat.answer_text(new)
    return answers


@contextmanager
def _without_own_settings(model: ChatGLMForConditionalGeneration) -> Iterator[None]:
    """Inside, the base has no generation settings, which `generate` would use for what its argument leaves open."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
