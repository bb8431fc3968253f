"""The FastAPI application: routes of OpenAI's API over the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.plain import PlainText
from chatglm_ptuning.chat.tools import tool_names
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.serving.answers import AnswerReader
from chatglm_ptuning.serving.api.choices import Answers, Choice
from chatglm_ptuning.serving.api.conversation import chat_prompt, offered_tools, text_prompts
from chatglm_ptuning.serving.api.errors import ENGINE_ERRORS, ApiError, ErrorBody, Json, add_handlers, of_engine
from chatglm_ptuning.serving.api.guard import Guard, Keys
from chatglm_ptuning.serving.api.metrics import ApiMetrics
from chatglm_ptuning.serving.api.models import Models
from chatglm_ptuning.serving.api.pump import TokenPump
from chatglm_ptuning.serving.api.replies import ChatReply, Reply, TextReply
from chatglm_ptuning.serving.api.schema import ChatRequest, CompletionRequest, PrefixRequest, Request
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.request import SamplingSettings
from chatglm_ptuning.serving.vllm.engine import VllmEngine
from chatglm_ptuning.version import kit_version

_Result = TypeVar("_Result")
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
    keys: Keys = field(default_factory=Keys)

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
                "max_tokens" if room > 0 else "prompt" if isinstance(request, CompletionRequest) else "messages",
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


class EventStream(StreamingResponse):
    """Server-sent events; cancels the answers when the client goes away.

    Args:
        at_end: called at the end of the response, however it ends.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._at_end = events, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()
            await self._events.aclose()


def make_app(service: Service) -> FastAPI:
    """The application; the engine must have been started."""
    app = FastAPI(
        title="ChatGLM P-Tuning", version=kit_version() or "unknown", docs_url=None, redoc_url=None,
        default_response_class=Json, redirect_slashes=False,
        responses={"4XX": {"description": "the request is refused", "model": ErrorBody}},
    )  # fmt: skip
    add_handlers(app)
    app.add_middleware(Guard, keys=service.keys, body_limit=service.limits.body_bytes, metrics=service.metrics)
    chat_format = service.tokenizer.chat
    plain_text = PlainText(service.tokenizer.vocabulary)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Any:
        """Answers a conversation."""
        names = tool_names(offered_tools(request))
        answers, _ = await run_in_threadpool(
            service.submit,
            request,
            lambda: [chat_prompt(request, chat_format)],
            lambda _: AnswerReader(chat_format, request.stops, names),
        )
        return await send(request, http, ChatReply(request, answers, service.tokenizer.vocabulary))

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Any:
        """Continues a text."""
        answers, prompts = await run_in_threadpool(
            service.submit,
            request,
            lambda: text_prompts(request, chat_format),
            lambda prompt: AnswerReader(plain_text, request.stops, context=prompt),
        )
        texts = [_prompt_text(one, chat_format) for one in prompts]
        return await send(request, http, TextReply(request, answers, service.tokenizer.vocabulary, texts))

    async def send(request: Request, http: HttpRequest, reply: Reply) -> Response:
        def at_end() -> None:
            reply.answers.cancel()
            service.note(request, reply.answers)

        if request.stream:
            return EventStream(reply.events(), at_end)
        try:
            return await _unless_gone(http, reply.whole())
        except ENGINE_ERRORS as error:
            raise of_engine(error) from error
        finally:
            at_end()

    @app.get("/v1/models")
    def models() -> Any:
        """All models."""
        found = []
        for name in service.models.names:
            try:
                found.append(service.models.describe(name))
            except ApiError:  # removed meanwhile
                continue
        return Json({"object": "list", "data": found})

    @app.get("/v1/models/{model}")
    def model(model: str) -> Any:
        """One model."""
        return Json(service.models.describe(model))

    @app.post("/v1/prefixes")
    def load_prefix(request: PrefixRequest) -> Any:
        """Loads a prefix of the folder, again if it is loaded."""
        try:
            return Json(service.models.load(request.name))
        except ENGINE_ERRORS as error:
            raise of_engine(error) from error

    @app.delete("/v1/prefixes/{name}")
    def unload_prefix(name: str) -> Any:
        """Unloads a prefix; it is not served until it is loaded again."""
        service.models.unload(name)
        return Json({"id": name, "object": "model", "deleted": True})

    @app.get("/health")
    async def health() -> Any:
        """Whether the server answers."""
        return Json({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> Any:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _prompt_text(prompt: Sequence[int], chat_format: ChatFormat) -> str:
    return chat_format.vocabulary.decode(prompt[len(chat_format.start_ids) :])


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The result of the work as JSON; the work is cancelled when the client goes away."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        # Nobody receives this status; the log shows it.
        return Json(working.result()) if working.done() else Response(status_code=499)
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)
