"""`chat` and `stream_chat` with the arguments and results of the official code of ChatGLM2, ChatGLM3 and GLM-4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from chatglm_ptuning.chat.turn import Answer, ChatTurn
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

logger = logging.get_logger(__name__)

_OFFICIAL_SETTINGS = {"do_sample": True, "top_p": 0.8, "temperature": 0.8}


def sampling_settings(generation_config: GenerationConfig, **given: Any) -> dict[str, Any]:
    """`do_sample`, `top_p` and `temperature` of a chat.

    Args:
        generation_config: of the base; it counts where nothing is given, and the official code's values without it.
        given: any of the three; None is not given.
    """
    found = {}
    for name, official in _OFFICIAL_SETTINGS.items():
        values = (given.get(name), getattr(generation_config, name, None), official)
        found[name] = next(value for value in values if value is not None)
    return found


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Ends an answer whose scores are invalid (NaN, +inf or only -inf), instead of failing or sampling from them.

    Args:
        stop_id: the token that is chosen in an invalid row.
    """

    def __init__(self, stop_id: int) -> None:
        self.stop_id = stop_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `[batch, vocab]` with the invalid rows replaced."""
        broken = (scores.isnan() | scores.isposinf()).any(dim=-1) | scores.isneginf().all(dim=-1)
        if not broken.any():
            return scores
        logger.warning_once("The model's scores are NaN or infinite: the answer ends here. Try bfloat16 or float32.")
        scores = scores.masked_fill(broken[:, None], -torch.inf)
        scores[broken, self.stop_id] = 0.0
        return scores


class ChatMixin:
    """Chatting with a language model."""

    @torch.no_grad()
    def chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: Sequence[Mapping[str, Any] | Sequence[str]] | None = None,
        role: str = "user",
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        prefix: PrefixArgument = None,
        **kwargs: Any,
    ) -> tuple[str | dict[str, Any], list]:
        """Answers a query (official file: modeling_chatglm.py of ChatGLM3-6B).

        Args:
            history: the previous turns, as this method returned them; not changed. In the formats chatglm3 and glm4
                messages with `role` and `content` (or pairs), in chatglm2 and base (query, response) pairs.
            role: role of the query; "observation" for a tool's result (chatglm3 and glm4).
            max_length: maximum number of tokens of conversation and answer together, at most the base's `seq_length`.
            do_sample, top_p, temperature: by default those of the base's generation_config.json; without it True, 0.8
                and 0.8, as in the official code.
            prefix: as for `generate`; by default the selected one.
            kwargs: more settings of `generate`; `max_new_tokens` replaces `max_length`.

        Returns:
            The response and the history with this turn. The response is a text. For a tool call it is a dictionary
            with `name` and `parameters` if the history's system message has `tools`, else with `name` and `content`.

        Raises:
            ValueError: if the history has another format, the conversation leaves no room for an answer, or the prefix
                is untrained.
        """
        turn = ChatTurn(tokenizer.chat, query, history, role)
        given = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature, **kwargs}
        settings = self._chat_settings(tokenizer, turn, max_length, logits_processor, given)
        output = self.generate(**settings, num_beams=num_beams, prefix=prefix)
        answer = turn.read(output[0, settings["input_ids"].shape[1] :].tolist())
        return answer.response, answer.history

    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: Sequence[Mapping[str, Any] | Sequence[str]] | None = None,
        role: str = "user",
        past_key_values: Cache | None = None,
        max_length: int = 8192,
        do_sample: bool | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        return_past_key_values: bool = False,
        prefix: PrefixArgument = None,
        **kwargs: Any,
    ) -> Iterator[tuple]:
        """Answers a query and yields the response so far each time it has grown; the last one is complete.

        Arguments as in `chat`. The answer is computed in the caller's thread, during each `next`. Closing the generator
        ends it, and its errors are raised there.

        Args:
            past_key_values: the cache of an earlier call. Tokens at the beginning that both conversations share are not
                computed again. The cache never changes the answer, and `history` is still needed.
            return_past_key_values: whether to yield the cache too. It is the same object each time, holds this turn
                as far as it has been computed, and belongs to the prefix.

        Yields:
            (response, history), or (response, history, past_key_values).

        Raises:
            ValueError: as in `chat`, and if `past_key_values` was filled under another prefix.
        """
        turn = ChatTurn(tokenizer.chat, query, history, role)
        given = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature, **kwargs}
        settings = self._chat_settings(tokenizer, turn, max_length, logits_processor, given)
        generated: list[int] = []
        answer = shown = None
        cache = past_key_values

        def result(answer: Answer) -> tuple:
            return (answer.response, answer.history, cache) if return_past_key_values else answer[:2]

        for token, cache in self._generate_stream(past_key_values=past_key_values, prefix=prefix, **settings):  # noqa: B007
            generated.append(token)
            answer = turn.read(generated)
            if not answer.unfinished and (shown is None or answer.history != shown.history):
                shown = answer
                yield result(answer)
        if answer is not None and (shown is None or answer.history != shown.history):
            yield result(answer)

    def _chat_settings(
        self,
        tokenizer: ChatGLMTokenizer,
        turn: ChatTurn,
        max_length: int,
        logits_processor: LogitsProcessorList | None,
        given: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments of `generate` for a turn; `given` ones that are None get their default."""
        ids = turn.input_ids()
        input_ids = torch.tensor([ids], device=self.device)
        stop_ids = tokenizer.chat.stop_ids
        settings = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "eos_token_id": stop_ids,
            "pad_token_id": tokenizer.pad_token_id,
            "logits_processor": LogitsProcessorList(
                [*(logits_processor or []), InvalidScoreLogitsProcessor(stop_ids[0])]
            ),
        }
        if given.get("max_new_tokens") is None:
            settings["max_length"] = min(max_length, self.config.seq_length)
            if len(ids) >= settings["max_length"]:
                raise ValueError(
                    f"The conversation has {len(ids)} tokens, which leaves no room for an answer: max_length is "
                    f"{max_length}, the base's seq_length {self.config.seq_length}. Drop the oldest turns."
                )
        settings |= sampling_settings(self.generation_config, **{name: given.pop(name) for name in _OFFICIAL_SETTINGS})
        if not settings["do_sample"]:
            del settings["top_p"], settings["temperature"]
        return settings | given

    def _generate_stream(
        self, input_ids: torch.LongTensor, past_key_values: Cache | None, prefix: PrefixArgument, **settings: Any
    ) -> Iterator[tuple[int, Cache]]:
        """As `generate` for one row, `[1, seq_len]`; yields every token with the cache.

        Raises:
            ValueError: if `past_key_values` was filled under another prefix, and as `generate`.
        """
        prefix = self.resolve_prefix(prefix)
        cache = self._reusable_part(past_key_values, input_ids[0].tolist(), prefix)
        steps = type(self)._generate_steps
        return self.generate(
            input_ids, **settings, past_key_values=cache, use_cache=True, prefix=prefix, custom_generate=steps
        )

    def _reusable_part(self, cache: Cache | None, ids: list[int], prefix: PrefixBatch) -> Cache | None:
        """The cache, cropped to the tokens that it shares with the beginning of `ids`; None if there are none.

        Raises:
            ValueError: if it was filled under another prefix.
        """
        length = 0 if cache is None else int(cache.get_seq_length())
        if length == 0:
            return cache
        prefix.claim(cache)
        cached_ids: list[int] = getattr(cache, "cached_ids", [])[:length]
        # The last token is always computed: its logits are needed.
        common = next(
            (place for place, pair in enumerate(zip(cached_ids, ids, strict=False)) if pair[0] != pair[1]),
            min(len(cached_ids), len(ids) - 1),
        )
        if common == 0 or not isinstance(cache, DynamicCache):
            return None
        cache.crop(common - length)
        cache.cached_ids = cached_ids[:common]
        return cache

    def _generate_steps(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[tuple[int, Cache]]:
        """The decoding loop that `generate` runs after preparing its arguments, for one row; yields token by token.

        `cached_ids` of the cache has its tokens. During a forward pass it is empty, so that an interrupted pass leaves
        nothing to reuse.
        """
        cache = model_kwargs["past_key_values"]
        cached_ids: list[int] = cache.cached_ids if int(cache.get_seq_length()) else []
        while True:
            new_ids = input_ids[0, len(cached_ids) :].tolist()
            inputs = self.prepare_inputs_for_generation(input_ids, next_sequence_length=len(new_ids), **model_kwargs)
            cache.cached_ids = []
            outputs = self(**inputs, return_dict=True)
            cached_ids.extend(new_ids)
            cache.cached_ids = cached_ids
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
            scores = logits_processor(input_ids, outputs.logits[:, -1].float())
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat((input_ids, token), dim=1)
            yield int(token), cache
            if stopping_criteria(input_ids, None).all():
                return
