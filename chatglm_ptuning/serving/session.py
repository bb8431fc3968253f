"""One conversation with a model: history, cache, and switching of prefixes between turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from transformers.cache_utils import Cache

from chatglm_ptuning.chat.message import Message, turn_starts
from chatglm_ptuning.chat.turn import ChatTurn, History, message_history

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
    from chatglm_ptuning.prefix.batch import PrefixBatch

_MOST_NEW_TOKENS = 1024


class ChatSession:
    """Keeps the history of one conversation, its prefix and its cache of keys and values.

    The cache never changes an answer. Long conversations are truncated by dropping whole turns, oldest first, so that
    the answer fits into the base's `seq_length`. Several sessions may share a model.

    Args:
        max_new_tokens: most tokens of one answer; by default half of the base's `seq_length`, 1024 at most.
        do_sample: False for greedy decoding, which ignores `top_p` and `temperature`.
        top_p, temperature: by default the base's own, see `chat`.

    Attributes:
        history: the turns so far, as `model.chat` takes and returns them.
        prefix: name of the prefix of the next answers, None for the plain base; initially the model's selected one.

    Raises:
        ValueError: if max_new_tokens does not fit into `seq_length`.
    """

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
    ) -> None:
        seq_length = model.config.seq_length
        if max_new_tokens is None:
            max_new_tokens = min(_MOST_NEW_TOKENS, seq_length // 2)
        if not 0 < max_new_tokens < seq_length:
            raise ValueError(
                f"max_new_tokens must be from 1 to {seq_length - 1} (seq_length - 1), got {max_new_tokens}."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.history: History = []
        self.prefix = model.selected_prefix
        self._sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        self._cache: Cache | None = None

    def stream(self, query: str) -> Iterator[str]:
        """Answers a query and yields the text in pieces as they are generated.

        Closing the iterator ends the answer. The text yielded so far is kept in the history, also after an error.

        Raises:
            ValueError: if the query alone is too long, naming the sizes; the history is unchanged.
        """
        prefix = self.model.prefix_batch(self.prefix)
        before = self._recent_history(query)
        answers = self.model.stream_chat(
            self.tokenizer,
            query,
            history=before,
            past_key_values=self._usable_cache(prefix),
            return_past_key_values=True,
            prefix=prefix,
            max_new_tokens=self.max_new_tokens,
            **self._sampling,
        )
        shown = ""
        with closing(answers):
            for _, self.history, self._cache in answers:
                text = self._text_of(self.history[len(before) :])
                piece, shown = text[len(shown) :], text
                if piece:
                    yield piece

    def switch_prefix(self, name: str | None) -> None:
        """Selects the prefix of the next answers, None for the plain base; keeps the history and drops the cache.

        Raises:
            KeyError: if no prefix of that name is loaded.
        """
        self.model.prefix_batch(name)  # raises if the name is not loaded
        self.prefix = name
        self._cache = None

    def clear(self) -> None:
        """Starts a new conversation."""
        self.history = []
        self._cache = None

    def _usable_cache(self, prefix: PrefixBatch) -> Cache | None:
        if self._cache is not None:
            try:
                prefix.claim(self._cache)
            except ValueError:  # another prefix was loaded, perhaps under the same name
                self._cache = None
        return self._cache

    def _recent_history(self, query: str) -> History:
        """The latest turns that leave room for the answer."""
        history = self.history
        room = self.model.config.seq_length - self.max_new_tokens
        while (length := len(ChatTurn(self.tokenizer.chat, query, history).input_ids())) > room:
            shorter = _without_oldest_turn(history)
            if len(shorter) == len(history):
                raise ValueError(
                    f"The message takes {length} tokens; there is room for {room} (seq_length "
                    f"{self.model.config.seq_length} less max_new_tokens {self.max_new_tokens})."
                )
            history = shorter
        return history

    def _text_of(self, turn: History) -> str:
        """The model's text in a turn; of a tool call the tool's name and the call."""
        messages = map(Message.from_dict, message_history(turn))
        return "\n".join(self.tokenizer.chat.text_of(message) for message in messages if message.role == "assistant")


def _without_oldest_turn(history: History) -> History:
    if not history or isinstance(history[0], tuple):
        return history[1:]
    starts = turn_starts([message["role"] for message in history])
    return history[: starts[0]] + history[starts[1] if len(starts) > 1 else len(history) :] if starts else history
