"""What the routes share: the engine, and how a request becomes answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.serving.answers import AnswerReader
from chatglm_ptuning.serving.api.choices import Answers, Choice
from chatglm_ptuning.serving.api.errors import ENGINE_ERRORS, ApiError, of_engine
from chatglm_ptuning.serving.api.guard import Access
from chatglm_ptuning.serving.api.metrics import ApiMetrics
from chatglm_ptuning.serving.api.models import Models
from chatglm_ptuning.serving.api.pump import TokenPump
from chatglm_ptuning.serving.api.schema import Request
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.request import SamplingSettings
from chatglm_ptuning.serving.vllm.engine import VllmEngine

_GREEDY_BELOW = 1e-4
"""Temperatures that divide the logits beyond the range of the numbers."""
_SMALLEST_TOP_P = 1e-6
_SEEDS = 2**63


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body_bytes: size of its body.
        choices: answers, over all its prompts.
        new_tokens: tokens of an answer; None for as many as the base's `seq_length` leaves.
    """

    body_bytes: int = 2**21
    choices: int = 16
    new_tokens: int | None = None


@dataclass
class Service:
    """What the routes need.

    Attributes:
        sampling: `temperature` and `top_p` of requests that do not set them.
    """

    engine: Engine | VllmEngine
    tokenizer: ChatGLMTokenizer
    models: Models
    sampling: dict[str, float]
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        self.metrics = ApiMetrics(self.engine)
        self.pump = TokenPump()

    def submit(
        self,
        request: Request,
        make_prompts: Callable[[], Sequence[list[int]]],
        make_reader: Callable[[list[int]], AnswerReader],
    ) -> tuple[Answers, Sequence[list[int]]]:
        """Gives the engine all answers that a request asks for, or none.

        Args:
            make_prompts: encodes the prompts.
            make_reader: makes the reader of an answer to a prompt.

        Returns:
            The running answers, and the prompts.

        Raises:
            ApiError: if the request cannot be answered.
        """
        prefix = self.models.prefix_of(request.model)
        if request.choices > self.limits.choices:
            message = f"At most {self.limits.choices} answers in one request, got {request.choices}."
            raise ApiError(400, message, "too_many_choices", "n")
        answers: list[Choice] = []
        try:
            prompts = make_prompts()
            for place, prompt in enumerate(prompts):
                most = self._new_tokens(request, len(prompt), prefix)
                for number in range(request.n or 1):
                    settings = self._settings(request, most, number)
                    generation = self.engine.submit(prompt, settings, prefix)
                    answers.append(Choice(len(answers), place, generation, make_reader(prompt)))
        except Exception as error:
            for choice in answers:
                choice.generation.cancel()
            if isinstance(error, ENGINE_ERRORS):
                raise of_engine(error) from error
            if isinstance(error, ValueError):
                raise ApiError(400, str(error), "invalid_value") from error
            if isinstance(error, RecursionError):
                raise ApiError(400, "The request is nested too deeply.", "invalid_value") from error
            raise
        return Answers(answers, self.pump), prompts

    def note(self, request: Request, answers: Answers) -> None:
        """Counts a request whose answers have ended."""
        tokens = self.metrics.tokens
        tokens.labels(request.model, "prompt").inc(answers.prompt_tokens)
        tokens.labels(request.model, "cached").inc(answers.cached_tokens)
        tokens.labels(request.model, "completion").inc(answers.generated)
        for choice in answers.choices:
            if choice.generation.first_token_at is not None:
                waited = choice.generation.first_token_at - choice.generation.arrived
                self.metrics.first_token_seconds.observe(waited)

    def _new_tokens(self, request: Request, prompt_tokens: int, prefix: str | None) -> int:
        context = self.engine.context_length(prefix)
        room = context - prompt_tokens
        most = self.limits.new_tokens or context
        asked = request.most_tokens
        if asked is not None and asked > most:
            raise ApiError(400, f"At most {most} tokens in an answer, got {asked}.", "invalid_value", "max_tokens")
        if room < (asked or 1):
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens; the prompt has {prompt_tokens}, and "
                f"{asked or 1} more are needed for the answer.",
                "context_length_exceeded",
                "max_tokens" if room > 0 else request.prompt_field,
            )
        return asked or min(most, room)

    def _settings(self, request: Request, most: int, number: int) -> SamplingSettings:
        temperature = self.sampling["temperature"] if request.temperature is None else request.temperature
        top_p = self.sampling["top_p"] if request.top_p is None else request.top_p
        return SamplingSettings(
            max_new_tokens=most,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=max(top_p, _SMALLEST_TOP_P),
            top_k=request.top_k or 0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            seed=None if request.seed is None else (request.seed + number) % _SEEDS,
            stop_ids=tuple(self.tokenizer.chat.stop_ids),
            top_logprobs=request.shown_logprobs,
        )
