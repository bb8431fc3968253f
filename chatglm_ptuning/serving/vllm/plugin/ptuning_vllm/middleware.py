"""ASGI middleware for vLLM's own server: every exported prefix is the name of a model.

Start vLLM with `--middleware ptuning_vllm.middleware.PrefixModels`. Settings by environment: `PTUNING_PREFIX_DIR` and
`PTUNING_PLACEHOLDER_ID`, as in the connector's settings, and `PTUNING_BASE`, the base's served name (`base`).

A request for a prefix becomes one for the base with placeholders and a `cache_salt`; the response then names the
prefix and does not count the placeholders. Prompts are token ids: vLLM lacks this family's tokenizers and chat formats.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from .prefixes import SALT, Prefix, PrefixFolder

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

_PROMPTS = {"/v1/completions": "prompt", "/inference/v1/generate": "token_ids"}
_REFUSED = ("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "echo", "truncate_prompt_tokens",
            "prompt_embeds", "use_beam_search", "cache_salt", "skip_reading_prefix_cache", "kv_transfer_params",
            "features", "content_parts", "mm_payload", "continuous_usage_stats")  # fmt: skip
"""Fields that would compute or show the placeholders, or read another cache."""


class Refused(ValueError):
    """A request that vLLM would answer wrongly."""


def rewrite(path: str, body: dict[str, Any], prefixes: dict[str, Prefix], base: str, placeholder: int) -> int:
    """Turns a request for a prefix, in place, into one for the base; leaves others as they are.

    Returns:
        The number of placeholders in front of each prompt; 0 for other requests.

    Raises:
        Refused: with the reason and the way out.
    """
    if str(body.get("cache_salt") or "").startswith(SALT):
        raise Refused(f"cache_salt may not begin with {SALT!r}: name the prefix as the model.")
    model = body.get("model")
    prefix = prefixes.get(model) if isinstance(model, str) and model != base else None
    if prefix is None:
        return 0
    field = _PROMPTS.get(path)
    if field is None:
        raise Refused(
            f"{path} has no prefixes: send token ids to {' or '.join(_PROMPTS)}, or serve chats by `chatglm-ptuning "
            "serve --engine vllm`."
        )
    for settings in (body, body.get("sampling_params"), body.get("stream_options")):
        for name in _REFUSED if isinstance(settings, dict) else ():
            value = settings.get(name)
            if value is not None and value is not False:  # 0 asks for some of them
                raise Refused(f"{name} cannot be had with a prefix: leave it out, or ask the model {base!r}.")
    prompt = body.get(field)
    several = field == "prompt" and isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], list)
    prompts = prompt if several else [prompt]
    if not all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in prompts):
        raise Refused(
            f"With a prefix, {field} must be token ids, at least one. Texts: `chatglm-ptuning serve --engine vllm`."
        )
    prompts = [[placeholder] * prefix.length + one for one in prompts]
    body |= {"model": base, "cache_salt": prefix.salt, field: prompts if several else prompts[0]}
    return prefix.length


def shown(content: dict[str, Any], model: str, length: int, prompts: int) -> dict[str, Any]:
    """A response, or an event of a stream, with the prefix as its model and without placeholders.

    Args:
        length: number of placeholders in front of each prompt.
        prompts: number of prompts.
    """
    if content.get("model") is not None:
        content["model"] = model
    if usage := content.get("usage"):
        hidden = length * prompts
        for name in ("prompt_tokens", "total_tokens"):
            usage[name] -= hidden
        if details := usage.get("prompt_tokens_details"):
            details["cached_tokens"] = max(0, (details.get("cached_tokens") or 0) - hidden)
    for one in (content, *content.get("choices", ())):
        if one.get("prompt_token_ids") is not None:
            one["prompt_token_ids"] = one["prompt_token_ids"][length:]
    return content


class PrefixModels:
    """See the module."""

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app
        self._folder = PrefixFolder(os.environ.get("PTUNING_PREFIX_DIR", "prefixes"))
        self._placeholder = int(os.environ.get("PTUNING_PLACEHOLDER_ID", "0"))
        self._base = os.environ.get("PTUNING_BASE", "base")

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Handles a request."""
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/v1/models":
            await self._app(scope, receive, _rewriting(send, self._with_prefixes))
        elif scope["type"] == "http" and scope["method"] == "POST":
            await self._post(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _post(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        data, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            data, more = data + message.get("body", b""), message.get("more_body", False)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None  # vLLM says what is wrong with it
        if isinstance(body, dict):
            model = body.get("model")
            try:
                length = rewrite(scope["path"], body, self._folder.by_name(), self._base, self._placeholder)
            except Refused as error:
                await _refuse(send, str(error))
                return
            if length:
                prompts = body.get("prompt") or [0]
                count = len(prompts) if isinstance(prompts[0], list) else 1
                send = _rewriting(send, lambda content: shown(content, model, length, count))
                data = json.dumps(body).encode()
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        is_given = False

        async def replay() -> _Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": data, "more_body": False}

        await self._app({**scope, "headers": [*headers, (b"content-length", str(len(data)).encode())]}, replay, send)

    def _with_prefixes(self, content: dict[str, Any]) -> dict[str, Any]:
        if isinstance(content.get("data"), list):
            known = {"object": "model", "created": int(time.time()), "owned_by": "ptuning", "parent": self._base}
            content["data"] += [{"id": name, **known} for name in self._folder.by_name()]
        return content


def _rewriting(send: _Send, change: Callable[[dict[str, Any]], dict[str, Any]]) -> _Send:
    """A `send` that changes the JSON of a response, or of each event of a stream."""
    start: _Message | None = None
    waiting = b""

    async def rewriting_send(message: _Message) -> None:
        nonlocal start, waiting
        if message["type"] == "http.response.start":
            start = message
            if _is_stream(message):
                await send(message)
            return
        if message["type"] != "http.response.body" or start is None:
            await send(message)
            return
        waiting += message.get("body", b"")
        more = message.get("more_body", False)
        if _is_stream(start):
            ready, separator, waiting = waiting.rpartition(b"\n\n") if more else (waiting, b"", b"")
            await send({**message, "body": b"".join(_changed_events(ready + separator, change))})
        elif not more:
            body = _changed(waiting, change)
            headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({**message, "body": body})

    return rewriting_send


def _is_stream(start: _Message) -> bool:
    kinds = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return any(kind.startswith(b"text/event-stream") for kind in kinds)


def _changed_events(events: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[bytes]:
    for line in events.splitlines(keepends=True):
        if line.startswith(b"data: {"):
            yield b"data: " + _changed(line[6:].rstrip(), change) + line[len(line.rstrip()) :]
        else:
            yield line


def _changed(data: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    try:
        content = json.loads(data)
    except ValueError:
        return data
    return json.dumps(change(content), ensure_ascii=False).encode() if isinstance(content, dict) else data


async def _refuse(send: _Send, message: str) -> None:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    data = json.dumps({"error": error}, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": data})
