"""A conversation of many turns with a model whose prefix may change between them."""

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

_MOST_NEW_TOKENS = 1024


class ChatSession:
    """Keeps the history of one conversation, its prefix and its cache of keys and values.

    The cache saves computing earlier turns again and never changes an answer. The oldest turns are forgotten when the
    conversation would outgrow the base's `seq_length`. Several sessions may share a model, one answer at a time.

    Args:
        max_new_tokens: most tokens of one answer; by default half of the base's `seq_length`, 1024 at most.
        do_sample: False for greedy decoding, which ignores `top_p` and `temperature`.
        top_p, temperature: by default the base's own, see `chat`.

    Attributes:
        history: the turns so far, in the form that `model.chat` takes and gives.
        prefix: the prefix of the next answers, or None for the plain base; at first the model's selected one.

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
        """Answers a query, yielding the text piece by piece as it is generated.

        Closing the iterator early ends the answer; what was yielded stays in the history. An error in the middle
        leaves the turn in the history up to there too.

        Raises:
            ValueError: if the query alone is too long, naming the sizes; the history is as before then.
        """
        self.model.set_prefix(self.prefix)
        before = self._recent_history(query)
        answers = self.model.stream_chat(
            self.tokenizer,
            query,
            history=before,
            past_key_values=self._usable_cache(),
            return_past_key_values=True,
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
        """Answers with another prefix from now on; None for the plain base. The history stays, the cache does not.

        Raises:
            KeyError: if no prefix of that name is loaded.
        """
        self.model.set_prefix(name)
        self.prefix = name
        self._cache = None

    def clear(self) -> None:
        """Forgets the conversation."""
        self.history = []
        self._cache = None

    def _usable_cache(self) -> Cache | None:
        if self._cache is not None:
            try:
                self.model.base_model.prefixes.claim_cache(self._cache)
            except ValueError:  # a prefix was loaded since, perhaps under the same name
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
        """What the model said in a turn; of a tool call the tool's name and the call."""
        messages = map(Message.from_dict, message_history(turn))
        return "\n".join(self.tokenizer.chat.text_of(message) for message in messages if message.role == "assistant")


def _without_oldest_turn(history: History) -> History:
    if not history or isinstance(history[0], tuple):
        return history[1:]
    starts = turn_starts([message["role"] for message in history])
    return history[: starts[0]] + history[starts[1] if len(starts) > 1 else len(history) :] if starts else history
