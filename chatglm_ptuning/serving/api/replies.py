"""OpenAI's objects of the two kinds of completion, whole and as chunks of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar

from chatglm_ptuning.model.vocabulary import Vocabulary
from chatglm_ptuning.serving.api.choices import Answers, News
from chatglm_ptuning.serving.api.conversation import tool_calls
from chatglm_ptuning.serving.api.errors import ENGINE_ERRORS, of_engine, to_json
from chatglm_ptuning.serving.api.schema import ChatRequest, CompletionRequest, Request
from chatglm_ptuning.serving.engine.request import Token


class Reply(ABC):
    """The answers to one request in OpenAI's form.

    Args:
        request: what was asked.
        vocabulary: spells the tokens of log probabilities.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, request: Request, answers: Answers, vocabulary: Vocabulary) -> None:
        self.request, self.answers, self.vocabulary = request, answers, vocabulary
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": request.model,
        }

    async def whole(self) -> dict[str, Any]:
        """The whole object, when all answers have ended.

        Raises:
            EngineError: if the engine failed.
        """
        news: dict[int, list[News]] = defaultdict(list)
        async with aclosing(self.answers.news()) as all_news:
            async for one in all_news:
                news[one.index].append(one)
        choices = []
        for index in range(len(self.answers.choices)):
            parts = news[index]
            text = "".join(part.text for part in parts)
            tokens = [token for part in parts for token in part.tokens]
            choices.append(self._choice(News(index, text, tokens, parts[-1].calls, parts[-1].finish_reason)))
        return {**self._head, "choices": choices, "usage": self.answers.usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the chunks, and `[DONE]`. If the engine fails, an error in OpenAI's form is the last."""
        head = {**self._head, "object": self.chunk_kind}
        with_usage = self.request.stream_options is not None and bool(self.request.stream_options.include_usage)
        ending = {"usage": None} if with_usage else {}
        for choice in self._first_choices():
            yield _event({**head, "choices": [choice], **ending})
        try:
            async with aclosing(self.answers.news()) as all_news:
                async for news in all_news:
                    for choice in self._chunk_choices(news):
                        yield _event({**head, "choices": [choice], **ending})
        except ENGINE_ERRORS as error:
            yield _event(of_engine(error).body)
            return
        if with_usage:
            yield _event({**head, "choices": [], "usage": self.answers.usage})
        yield b"data: [DONE]\n\n"

    @abstractmethod
    def _choice(self, whole: News) -> dict[str, Any]:
        """A whole answer."""

    def _first_choices(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    @abstractmethod
    def _chunk_choices(self, news: News) -> list[dict[str, Any]]:
        """Chunks of what is new of an answer."""

    def _spelled(self, token_id: int) -> str:
        return self.vocabulary.bytes_of_token(token_id).decode("utf-8", "replace")


class ChatReply(Reply):
    """`chat.completion`."""

    request: ChatRequest
    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _choice(self, whole: News) -> dict[str, Any]:
        calls = self._calls(whole)
        message: dict[str, Any] = {"role": "assistant", "content": whole.text if whole.text or not calls else None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": whole.index,
            "message": {**message, "refusal": None},
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
        }

    def _first_choices(self) -> list[dict[str, Any]]:
        return [
            {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
             "finish_reason": None}
            for choice in self.answers.choices
        ]  # fmt: skip

    def _chunk_choices(self, news: News) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if news.text or news.tokens:
            deltas.append({"content": news.text})
        if calls := self._calls(news):
            deltas.append({"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]})
        chunks = [{"index": news.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if news.tokens:
            chunks[0]["logprobs"] = self._logprobs(news)
        if news.finish_reason:
            chunks.append({"index": news.index, "delta": {}, "logprobs": None, "finish_reason": news.finish_reason})
        return chunks

    def _calls(self, news: News) -> list[dict[str, Any]]:
        return tool_calls(news.calls, at_most_one=self.request.parallel_tool_calls is False)

    def _logprobs(self, news: News) -> dict[str, Any] | None:
        if self.request.shown_logprobs is None:
            return None
        content = [
            {
                **self._logprob(token.id, token.logprob),
                "top_logprobs": [self._logprob(index, logprob) for index, logprob in token.top],
            }
            for token, _ in news.tokens
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = self.vocabulary.bytes_of_token(token_id)
        return {"token": self._spelled(token_id), "logprob": _finite(logprob), "bytes": list(spelled)}


class TextReply(Reply):
    """`text_completion`.

    Args:
        prompts: texts of the prompts, with which the answers begin if `echo` asks for them.
    """

    request: CompletionRequest
    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(
        self, request: CompletionRequest, answers: Answers, vocabulary: Vocabulary, prompts: list[str]
    ) -> None:
        super().__init__(request, answers, vocabulary)
        self._prompts = prompts if request.echo else [""] * len(prompts)

    def _choice(self, whole: News) -> dict[str, Any]:
        return self._text(whole.index, self._prompt(whole.index) + whole.text, whole.tokens, whole.finish_reason)

    def _first_choices(self) -> list[dict[str, Any]]:
        indices = [choice.index for choice in self.answers.choices if self._prompt(choice.index)]
        return [self._text(index, self._prompt(index), [], None) for index in indices]

    def _chunk_choices(self, news: News) -> list[dict[str, Any]]:
        return [self._text(news.index, news.text, news.tokens, news.finish_reason)]

    def _prompt(self, index: int) -> str:
        return self._prompts[self.answers.choices[index].prompt]

    def _text(
        self, index: int, text: str, tokens: list[tuple[Token, int]], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = {
                "tokens": [self._spelled(token.id) for token, _ in tokens],
                "token_logprobs": [_finite(token.logprob) for token, _ in tokens],
                "top_logprobs": [
                    {self._spelled(index): _finite(logprob) for index, logprob in token.top} for token, _ in tokens
                ],
                "text_offset": [place for _, place in tokens],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {to_json(chunk)}\n\n".encode()


def _finite(logprob: float | None) -> float:
    # JSON has no infinity; OpenAI writes this number for what is all but impossible.
    return -9999.0 if logprob is None else max(float(logprob), -9999.0)
