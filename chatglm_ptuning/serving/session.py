"""One conversation with an engine: history, sampling settings, and switching of prefixes between turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from chatglm_ptuning.chat.message import turn_starts
from chatglm_ptuning.chat.turn import ChatTurn, History
from chatglm_ptuning.model.chat_mixin import sampling_settings
from chatglm_ptuning.serving.answers import AnswerReader
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import RowPrefix
from chatglm_ptuning.serving.engine.request import SamplingSettings

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_MOST_NEW_TOKENS = 1024
_TOP_K = 50
"""The default of `generate`, and so of `chat`."""


class ChatSession:
    """Keeps the history of one conversation and its prefix; an engine answers.

    Long conversations are truncated by dropping whole turns, oldest first, so that the answer fits. Several sessions
    may share an engine.

    Args:
        engine: a running engine. Its model's loaded prefixes are those of the session.
        max_new_tokens: most tokens of one answer; by default half of the engine's context length, 1024 at most.
        do_sample: False for greedy decoding, which ignores `top_p` and `temperature`. The random numbers of an answer
            follow from torch's.
        top_p, temperature: by default the base's own, see `chat`.

    Attributes:
        history: the turns so far, as `model.chat` takes and returns them.
        prefix: name of the prefix of the next answers, None for the plain base; initially the model's selected one.

    Raises:
        ValueError: if max_new_tokens does not fit into the context length.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatGLMTokenizer,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
    ) -> None:
        context = engine.context_length()
        if max_new_tokens is None:
            max_new_tokens = min(_MOST_NEW_TOKENS, context // 2)
        if not 0 < max_new_tokens < context:
            raise ValueError(
                f"max_new_tokens must be from 1 to {context - 1} (the context length - 1), got {max_new_tokens}."
            )
        self.engine = engine
        self.model = engine.model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.history: History = []
        self.prefix = self.model.selected_prefix
        self._sampling = _sampling_of(
            self.model.generation_config, do_sample=do_sample, top_p=top_p, temperature=temperature
        )

    def stream(self, query: str) -> Iterator[str]:
        """Answers a query and yields the text in pieces as they are generated; a tool call as its name and the call.

        Closing the iterator ends the answer. The text yielded so far is kept in the history, also after an error.

        Raises:
            ValueError: if the query alone is too long, naming the sizes, or the prefix is untrained; the history is
                unchanged.
            EngineError, QueueFull: if the engine fails, or has too many other requests.
        """
        with torch.no_grad():
            batch = self.model.prefix_batch(self.prefix)
            self.model.check_prefix_is_trained(batch)
            prefix = RowPrefix.of(batch)
        turn, prompt_ids = self._turn(query, self.engine.context_length(prefix) - self.max_new_tokens)
        reader = AnswerReader(self.tokenizer.chat, tool_names=turn.tool_names, show_calls=True)
        generation = self.engine.submit(prompt_ids, self._settings(), prefix)
        try:
            for token in generation:
                if piece := reader.add(token.id):
                    self.history = turn.history_with(reader.messages)
                    yield piece
        finally:
            generation.cancel()
        piece = reader.finish()
        self.history = turn.history_with(reader.messages)
        if piece:
            yield piece

    def switch_prefix(self, name: str | None) -> None:
        """Selects the prefix of the next answers, None for the plain base; keeps the history.

        Raises:
            KeyError: if no prefix of that name is loaded.
        """
        self.model.prefix_batch(name)  # raises if the name is not loaded
        self.prefix = name

    def clear(self) -> None:
        """Starts a new conversation."""
        self.history = []

    def _settings(self) -> SamplingSettings:
        seed = int(torch.randint(2**63 - 1, ())) if self._sampling["temperature"] else None
        stop_ids = tuple(self.tokenizer.chat.stop_ids)
        return SamplingSettings(self.max_new_tokens, **self._sampling, seed=seed, stop_ids=stop_ids)

    def _turn(self, query: str, room: int) -> tuple[ChatTurn, list[int]]:
        """The query with the latest turns that leave room for the answer, and its ids."""
        history = self.history
        while True:
            turn = ChatTurn(self.tokenizer.chat, query, history)
            prompt_ids = turn.input_ids()
            if len(prompt_ids) <= room:
                return turn, prompt_ids
            shorter = _without_oldest_turn(history)
            if len(shorter) == len(history):
                raise ValueError(
                    f"The message takes {len(prompt_ids)} tokens; there is room for {room} (the context length of "
                    f"{room + self.max_new_tokens} less max_new_tokens {self.max_new_tokens})."
                )
            history = shorter


def _sampling_of(generation_config: GenerationConfig, **given: bool | float | None) -> dict[str, float]:
    """Settings of sampling, from the base's generation_config where nothing is given; as in `chat`."""
    found = sampling_settings(generation_config, **given)
    penalty = {"repetition_penalty": generation_config.repetition_penalty or 1.0}
    if not found["do_sample"]:
        return {"temperature": 0.0, **penalty}
    top_k = _TOP_K if generation_config.top_k is None else generation_config.top_k
    return {"temperature": found["temperature"], "top_p": found["top_p"], "top_k": top_k, **penalty}


def _without_oldest_turn(history: History) -> History:
    if not history or isinstance(history[0], tuple):
        return history[1:]
    starts = turn_starts([message["role"] for message in history])
    return history[: starts[0]] + history[starts[1] if len(starts) > 1 else len(history) :] if starts else history
