"""The FastAPI application: routes of OpenAI's API over the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatglm_ptuning.chat.plain import PlainText
from chatglm_ptuning.chat.tools import tool_names
from chatglm_ptuning.serving.answers import AnswerReader
from chatglm_ptuning.serving.api.conversation import chat_prompt, offered_tools, text_prompts
from chatglm_ptuning.serving.api.errors import ENGINE_ERRORS, ApiError, ErrorBody, Json, add_handlers, of_engine
from chatglm_ptuning.serving.api.guard import Guard
from chatglm_ptuning.serving.api.replies import ChatReply, Reply, TextReply
from chatglm_ptuning.serving.api.schema import ChatRequest, CompletionRequest, PrefixRequest
from chatglm_ptuning.serving.api.service import Service
from chatglm_ptuning.version import kit_version


def make_app(service: Service) -> FastAPI:
    """The application; the engine must have been started."""
    app = FastAPI(
        title="ChatGLM P-Tuning", version=kit_version() or "unknown", docs_url=None, redoc_url=None,
        default_response_class=Json, redirect_slashes=False,
        responses={"4XX": {"description": "the request is refused", "model": ErrorBody}},
    )  # fmt: skip
    app.state.service = service
    app.include_router(_routes)
    add_handlers(app)
    app.add_middleware(Guard, access=service.access, body_limit=service.limits.body_bytes, metrics=service.metrics)
    return app


async def _service_of(http: HttpRequest) -> Service:
    return http.app.state.service


_Service = Annotated[Service, Depends(_service_of)]
_routes = APIRouter()


@_routes.post("/v1/chat/completions")
async def chat_completions(request: ChatRequest, http: HttpRequest, service: _Service) -> Any:
    """Answers a conversation."""
    chat_format, names = service.tokenizer.chat, tool_names(offered_tools(request))
    answers, _ = await run_in_threadpool(
        service.submit,
        request,
        lambda: [chat_prompt(request, chat_format)],
        lambda _: AnswerReader(chat_format, request.stops, names),
    )
    return await _send(service, http, ChatReply(request, answers, service.tokenizer.vocabulary))


@_routes.post("/v1/completions")
async def completions(request: CompletionRequest, http: HttpRequest, service: _Service) -> Any:
    """Continues a text."""
    vocabulary, chat_format = service.tokenizer.vocabulary, service.tokenizer.chat
    plain_text = PlainText(vocabulary)
    answers, prompts = await run_in_threadpool(
        service.submit,
        request,
        lambda: text_prompts(request, chat_format),
        lambda prompt: AnswerReader(plain_text, request.stops, context=prompt),
    )
    texts = [vocabulary.decode(prompt[len(chat_format.start_ids) :]) for prompt in prompts]
    return await _send(service, http, TextReply(request, answers, vocabulary, texts))


@_routes.get("/v1/models")
def models(service: _Service) -> Any:
    """All models."""
    found = []
    for name in service.models.names:
        try:
            found.append(service.models.describe(name))
        except ApiError:  # removed meanwhile
            continue
    return Json({"object": "list", "data": found})


@_routes.get("/v1/models/{model}")
def model(model: str, service: _Service) -> Any:
    """One model."""
    return Json(service.models.describe(model))


@_routes.post("/v1/prefixes")
def load_prefix(request: PrefixRequest, service: _Service) -> Any:
    """Loads a prefix of the folder, again if it is loaded."""
    try:
        return Json(service.models.load(request.name))
    except ENGINE_ERRORS as error:
        raise of_engine(error) from error


@_routes.delete("/v1/prefixes/{name}")
def unload_prefix(name: str, service: _Service) -> Any:
    """Unloads a prefix; it is not served until it is loaded again."""
    service.models.unload(name)
    return Json({"id": name, "object": "model", "deleted": True})


@_routes.get("/health")
async def health() -> Any:
    """Whether the server answers."""
    return Json({"status": "ok"})


@_routes.get("/metrics")
def metrics(service: _Service) -> Any:
    """Metrics for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _send(service: Service, http: HttpRequest, reply: Reply) -> Response:
    """The response, as a stream if the request asks for one."""

    def at_end() -> None:
        reply.answers.cancel()
        service.note(reply.request, reply.answers)

    if reply.request.stream:
        return EventStream(reply.events(), at_end)
    try:
        return await _unless_gone(http, reply.whole())
    except ENGINE_ERRORS as error:
        raise of_engine(error) from error
    finally:
        at_end()


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
