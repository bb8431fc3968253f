"""A conversation with one model or two beside each other, and the answers of the engine; knows nothing of pages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.serving.answers import AnswerReader
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.request import (
    EngineError,
    Generation,
    PromptTooLong,
    QueueFull,
    SamplingSettings,
    UnknownPrefix,
)

_SECONDS_BETWEEN_LOOKS = 0.005
_SECONDS_BETWEEN_VIEWS = 0.05


class MessageTooLong(ValueError):
    """A message that does not fit, even without the turns before it.

    Attributes:
        tokens: of the prompt.
        room: tokens that there are for it.
    """

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(f"The message takes {tokens} tokens; there is room for {room} beside the answer.")
        self.tokens, self.room = tokens, room


@dataclass(frozen=True)
class AnswerSettings:
    """How a question is answered.

    Attributes:
        system: the system prompt; empty for none.
        temperature: 0 takes the most probable token.
        with_history: whether the turns before are repeated to the model. Many prefixes have learned single turns only.
    """

    system: str
    temperature: float
    top_p: float
    max_new_tokens: int
    with_history: bool = True


@dataclass
class Answer:
    """An answer, which grows while it is generated.

    Attributes:
        prefix: the name of the prefix; None for the plain base.
        messages: what the model said, as later prompts repeat it.
        tokens: number of generated tokens.
        seconds: from the request to the last token.
        finish_reason: None before the end, then "stop", "length", "cancelled" or "error".
        error: why there is no answer, or only a part of one.
        left_out: how many turns at the beginning of the conversation did not fit into the prompt.
    """

    prefix: str | None
    settings: AnswerSettings
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    finish_reason: str | None = None
    error: Exception | None = None
    left_out: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Speed; None without tokens."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def summary(self) -> dict[str, Any]:
        """How the answer came about, ready for JSON."""
        return {
            "prefix": self.prefix,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "finish_reason": self.finish_reason,
            **asdict(self.settings),
        }

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error."""
        self.finish_reason, self.error = "error", error


@dataclass
class Turn:
    """A question with the answers of the models beside each other."""

    question: str
    answers: list[Answer]

    def answer_of(self, side: int) -> Answer:
        """The answer on a side; the only one if the turn was not compared."""
        return self.answers[min(side, len(self.answers) - 1)]


@dataclass
class Talk:
    """The conversation of one visitor.

    Each side remembers its own answers. A side that is opened later has those of the other side until then. A question
    without any answer, because of an error, is not repeated to the model.
    """

    turns: list[Turn] = field(default_factory=list)
    _running: list[Generation] = field(default_factory=list)

    @property
    def is_answering(self) -> bool:
        """Whether an answer is being generated."""
        return bool(self._running)

    def said(self, side: int) -> list[list[Message]]:
        """The messages of each turn on a side."""
        answered = [(turn.question, turn.answer_of(side)) for turn in self.turns]
        return [[Message("user", question), *answer.messages] for question, answer in answered if answer.messages]

    def stop(self) -> None:
        """Ends the running answers; what they have said stays."""
        for generation in self._running:
            generation.cancel()

    def clear(self) -> None:
        """Begins a new conversation."""
        self.stop()
        # Another list: answers that are just ending have the old one.
        self.turns, self._running = [], []

    def started(self, generations: list[Generation]) -> None:
        """Takes the generations that `stop` ends, until their list is emptied."""
        self._running = generations

    def export(self, base: str) -> list[dict[str, Any]]:
        """The conversation of each side, ready for JSON: rows of the dataset format `messages`.

        What is known besides is under `meta`. A question without any answer is left out.

        Args:
            base: name of the base model.
        """
        sides = max((len(turn.answers) for turn in self.turns), default=0)
        meta = {"base": base, "exported": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        return [{"meta": meta, "messages": self._exported(side)} for side in range(sides)]

    def _exported(self, side: int) -> list[dict[str, Any]]:
        system = self.turns[-1].answer_of(side).settings.system
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for turn in self.turns:
            answer = turn.answer_of(side)
            if answer.messages:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": answer.text, "meta": answer.summary()})
        return messages


@dataclass
class _Running:
    """An answer that is being generated."""

    answer: Answer
    generation: Generation
    reader: AnswerReader

    def take(self) -> bool:
        """Waits a little for new tokens; False at the end."""
        answer, reader = self.answer, self.reader
        try:
            token = self.generation.get(timeout=_SECONDS_BETWEEN_LOOKS)
            while token is not None:
                answer.tokens += 1
                answer.seconds = time.monotonic() - self.generation.arrived
                reader.add(token.id)
                answer.text, answer.messages = reader.text, reader.messages
                token = self.generation.get(timeout=0)
        except TimeoutError:
            return True
        except EngineError as error:
            answer.fail(error)
        else:
            answer.finish_reason = self.generation.finish_reason
        reader.finish()
        answer.text = reader.text
        if answer.tokens or answer.error is None:
            answer.messages = reader.messages
        return False


class Answerer:
    """Answers the questions of conversations by the engine. For many threads; each `Talk` belongs to one visitor."""

    def __init__(self, engine: Engine, chat_format: ChatFormat) -> None:
        self.engine = engine
        self._format = chat_format

    def ask(
        self, talk: Talk, question: str, prefixes: Sequence[str | None], settings: AnswerSettings
    ) -> Iterator[None]:
        """Adds a turn, whose answers grow meanwhile; yields whenever there is something new to see.

        Errors are noted in the answers. Closing the iterator ends the answers.

        Args:
            prefixes: one for each side; None for the plain base.
        """
        # UTF-8 has no surrogates, which a browser may send.
        question = question.encode("utf-8", "replace").decode("utf-8")
        answers = [Answer(prefix, settings) for prefix in prefixes]
        started = [self._start(talk, side, question, answer) for side, answer in enumerate(answers)]
        running = [one for one in started if one is not None]
        generations = [one.generation for one in running]
        talk.turns.append(Turn(question, answers))
        talk.started(generations)
        try:
            yield
            shown = time.monotonic()
            while running:
                running = [one for one in running if one.take()]
                if time.monotonic() - shown >= _SECONDS_BETWEEN_VIEWS:
                    yield
                    shown = time.monotonic()
        finally:
            for generation in generations:
                generation.cancel()
            for one in running:
                one.answer.finish_reason = one.answer.finish_reason or "cancelled"
            generations.clear()
        yield

    def ask_again(self, talk: Talk, prefixes: Sequence[str | None], settings: AnswerSettings) -> Iterator[None]:
        """Answers the last question again, in place of its answers; as `ask`."""
        if talk.turns:
            yield from self.ask(talk, talk.turns.pop().question, prefixes, settings)

    def _start(self, talk: Talk, side: int, question: str, answer: Answer) -> _Running | None:
        try:
            prompt = self._prompt(talk.said(side) if answer.settings.with_history else [], question, answer)
            own = answer.settings
            sampling = SamplingSettings(
                own.max_new_tokens,
                temperature=own.temperature,
                top_p=own.top_p,
                stop_ids=tuple(self._format.stop_ids),
            )
            generation = self.engine.submit(prompt, sampling, answer.prefix)
        except (MessageTooLong, PromptTooLong, UnknownPrefix, QueueFull, EngineError, ValueError) as error:
            answer.fail(error)
            return None
        return _Running(answer, generation, AnswerReader(self._format))

    def _prompt(self, said: list[list[Message]], question: str, answer: Answer) -> list[int]:
        """The prompt, without the oldest turns if it is too long with them."""
        room = self.engine.context_length(answer.prefix) - answer.settings.max_new_tokens
        system = [Message("system", answer.settings.system)] if answer.settings.system else []
        while True:
            messages = [*system, *(message for turn in said[answer.left_out :] for message in turn)]
            prompt = self._format.encode_prompt(Conversation([*messages, Message("user", question)]))
            if len(prompt) <= room:
                return prompt
            if answer.left_out == len(said):
                raise MessageTooLong(len(prompt), max(room, 0))
            answer.left_out += 1
