"""The answers to a request while they are generated: text, log probabilities, reason of the end, usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from chatglm_ptuning.chat.message import Message
from chatglm_ptuning.serving.answers import AnswerReader
from chatglm_ptuning.serving.api.pump import TokenPump
from chatglm_ptuning.serving.engine.request import Generation, Token


class News(NamedTuple):
    """What is new of an answer.

    Attributes:
        index: of the answer.
        tokens: the tokens of the text with the place in the text where each begins.
        calls: the tool calls, at the end.
        finish_reason: OpenAI's, at the end: stop, length or tool_calls.
    """

    index: int
    text: str
    tokens: list[tuple[Token, int]]
    calls: list[Message]
    finish_reason: str | None


@dataclass
class Choice:
    """One answer.

    Args:
        prompt: index of its prompt.
    """

    index: int
    prompt: int
    generation: Generation
    reader: AnswerReader
    generated: int = 0
    finished: bool = False
    _pending: list[tuple[Token, int]] = field(default_factory=list)

    def take(self, tokens: Sequence[Token], ended: bool) -> News:
        """Reads new tokens."""
        reader, text = self.reader, ""
        for token in tokens:
            if reader.stopped:
                break
            self.generated += 1
            place = reader.settled
            text += reader.add(token.id)
            if reader.has_text:  # the line of the metadata has no text
                self._pending.append((token, place))
        if ended:
            text += reader.finish()
        self.finished = ended or reader.stopped
        if self.finished:
            self.generation.cancel()
        shown = len(reader.text)
        passed = [entry for entry in self._pending if entry[1] < shown]
        self._pending = self._pending[len(passed) :]
        if not self.finished:
            return News(self.index, text, passed, [], None)
        calls = reader.calls
        reason = "length" if self.generation.finish_reason == "length" and not reader.stopped else "stop"
        return News(self.index, text, passed, calls, "tool_calls" if calls and reason == "stop" else reason)


class Answers:
    """All answers to one request.

    Args:
        choices: the running answers, each with its index as its place.
    """

    def __init__(self, choices: Sequence[Choice], pump: TokenPump) -> None:
        self.choices = choices
        self._pump = pump

    async def news(self) -> AsyncGenerator[News, None]:
        """Yields what is new until all answers have ended. Leaving the iterator cancels them.

        Raises:
            EngineError: if the engine failed.
        """
        async with aclosing(self._pump.read([choice.generation for choice in self.choices])) as batches:
            async for index, tokens, ended in batches:
                choice = self.choices[index]
                if not choice.finished:
                    news = choice.take(tokens, ended)
                    if news.text or news.tokens or news.finish_reason:
                        yield news
                if all(choice.finished for choice in self.choices):
                    return

    def cancel(self) -> None:
        """Ends all answers."""
        for choice in self.choices:
            choice.generation.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(self._of_prompts("prompt_tokens").values())

    @property
    def cached_tokens(self) -> int:
        """How many of them were not computed again."""
        return sum(self._of_prompts("cached_tokens").values())

    @property
    def generated(self) -> int:
        """Tokens of all answers."""
        return sum(choice.generated for choice in self.choices)

    @property
    def usage(self) -> dict:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _of_prompts(self, name: str) -> dict[int, int]:
        # The first answer to a prompt; the others share its tokens.
        return {choice.prompt: getattr(choice.generation, name) for choice in reversed(self.choices)}
