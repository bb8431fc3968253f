"""What a caller of the engine gives and gets: settings of a request, its generated tokens, and errors."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass


class EngineError(RuntimeError):
    """The engine failed while it answered a request, or was closed."""


class UnknownPrefix(ValueError):
    """There is no prefix of this name, or it cannot be loaded."""


class PromptTooLong(ValueError):
    """A request can never fit."""


class QueueFull(RuntimeError):
    """Too many requests are waiting.

    Attributes:
        retry_after: seconds after which a place in the queue is likely.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already. Try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: samples from the fewest most probable tokens that have this probability together.
        top_k: samples from this many most probable tokens; 0 is no limit.
        repetition_penalty: makes tokens of the prompt and the answer less probable if above 1 (as in transformers).
        seed: the same seed gives the same tokens again, whatever else is in the batch.
        stop_ids: each of these tokens ends the answer, and does not belong to it.
        top_logprobs: None for no log probabilities. Otherwise the chosen token's is given, and those of this many most
            probable tokens: natural logarithms, of the model's own distribution (temperature 1, no penalty).

    Raises:
        ValueError: naming the setting that is out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("top_logprobs", 0)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if self.seed is not None and not _is_int(self.seed):
            raise ValueError(f"seed must be an integer or None, got {self.seed!r}.")
        for name, in_range, expected in (
            ("temperature", lambda value: 0 <= value <= 100, "from 0 to 100"),
            ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("repetition_penalty", lambda value: 0.01 <= value <= 100, "from 0.01 to 100"),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not in_range(value):
                raise ValueError(f"{name} must be a number {expected}, got {value!r}.")
        if not all(_is_int(stop_id) for stop_id in self.stop_ids):
            raise ValueError(f"stop_ids must be integers, got {self.stop_ids!r}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        logprob: its log probability; None unless asked for.
        top: ids and log probabilities of the most probable tokens, the most probable first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generation(Iterator[Token]):
    """The answer to one request, token by token as the engine generates it. One thread reads it.

    Attributes:
        finish_reason: None before the end, then "stop" (a stop id), "length", "cancelled" or "error".
        prompt_tokens: tokens of the prompt, without the prefix.
        cached_tokens: how many of them were shared with an earlier prompt and not computed again.
        arrived, first_token_at: times by `time.monotonic()`, in seconds; the second is None before the first token.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.arrived = time.monotonic()
        self.first_token_at: float | None = None
        self.finish_reason: str | None = None
        self.is_cancelled = False
        self._error: Exception | None = None
        self._tokens: queue.SimpleQueue[Token | None] = queue.SimpleQueue()
        self._is_read = False

    def __next__(self) -> Token:
        """Waits for the next token.

        Raises:
            EngineError: if the engine failed.
        """
        token = self.get()
        if token is None:
            raise StopIteration
        return token

    def get(self, timeout: float | None = None) -> Token | None:
        """The next token; None at the end.

        Args:
            timeout: most seconds to wait; None waits for as long as it takes.

        Raises:
            TimeoutError: if there is no token in that time.
            EngineError: if the engine failed.
        """
        if not self._is_read:
            try:
                token = self._tokens.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"No token in {timeout} s.") from None
            if token is not None:
                return token
            self._is_read = True
        if self._error is not None:
            raise EngineError(str(self._error)) from self._error
        return None

    @property
    def is_ready(self) -> bool:
        """Whether `get` returns, or raises an EngineError, without waiting."""
        return self._is_read or not self._tokens.empty()

    def cancel(self) -> None:
        """Ends the answer. The engine frees its slot within a step; tokens generated until then can still be read."""
        self.is_cancelled = True

    def put(self, token: Token) -> None:
        """Adds a token. Called by the engine."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self._tokens.put(token)

    def finish(self, reason: str, error: Exception | None = None) -> None:
        """Ends the answer. Called by the engine; only the first call counts."""
        if self.finish_reason is None:
            self.finish_reason, self._error = reason, error
            self._tokens.put(None)
