"""What every HTTP request passes first: host and keys, the size of its body, metrics and the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatglm_ptuning.serving.api.errors import ApiError
from chatglm_ptuning.serving.api.metrics import ApiMetrics
from chatglm_ptuning.serving.arguments import is_own_address
from chatglm_ptuning.serving.keys import KeySet

logger = logging.getLogger(__name__)

_WITHOUT_KEY = ("/health",)
_ADMIN = "/v1/prefixes"
_SECONDS_FOR_A_BODY = 30
_SECONDS_TO_DISCARD, _BYTES_TO_DISCARD = 10, 2**26
"""Limits of the rest of a refused request."""


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Attributes:
        api: keys that may ask for answers; without any, everyone may.
        admin: keys that may also load and unload prefixes; without any, nobody may.
        own_hosts_only: whether the header `Host` must name this machine itself. A web page that lets its own name
            point to this machine could otherwise use a server without keys through its visitors' browsers.
    """

    api: KeySet = field(default_factory=KeySet)
    admin: KeySet = field(default_factory=KeySet)
    own_hosts_only: bool = False

    def check(self, headers: Headers, path: str) -> None:
        """Checks the headers `Host` and `Authorization: Bearer KEY`.

        Raises:
            ApiError: if the host is another one, or the key is missing, unknown, or no admin key where one is needed.
        """
        # Browsers always send the host.
        if self.own_hosts_only and not is_own_address(_host_name(headers.get("host", "localhost"))):
            raise ApiError(
                403,
                "Without API keys this server answers only requests to 127.0.0.1, [::1] or localhost. Start it with an "
                "API key to use it by another name.",
                "host_not_allowed",
            )
        if path not in _WITHOUT_KEY:
            self._check_key(headers.get("authorization", ""), path == _ADMIN or path.startswith(f"{_ADMIN}/"))

    def _check_key(self, authorization: str, for_admin: bool) -> None:
        if not for_admin and not self.api:
            return
        if for_admin and not self.admin:
            raise ApiError(
                403, "This server has no admin key, so prefixes cannot be changed: start it with one.", "no_admin_key"
            )
        scheme, _, key = authorization.partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else ""
        is_admin = given in self.admin
        if given not in self.api and not is_admin:
            raise ApiError(
                401,
                "The API key is missing or wrong: send the header Authorization: Bearer KEY.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if for_admin and not is_admin:
            raise ApiError(403, "This needs an admin key.", "admin_key_needed")


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class _Body:
    """The body of a request while it arrives.

    Attributes:
        ended: whether no more of it will arrive.
        is_cut_off: whether the client went away before its end.
    """

    def __init__(self, receive: Receive) -> None:
        self.ended = self.is_cut_off = False
        self._receive = receive

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """Yields what arrives."""
        while not self.ended:
            message = await self._receive()
            self.is_cut_off = message["type"] == "http.disconnect"
            self.ended = self.is_cut_off or not message.get("more_body", False)
            yield message.get("body", b"")

    async def discard(self) -> None:
        """Waits for the end, within limits."""
        left = _BYTES_TO_DISCARD
        async for part in self.parts():
            left -= len(part)
            if left < 0:
                return


class Guard:
    """ASGI middleware. It refuses requests before their body is parsed; the log has neither texts nor keys.

    Args:
        body_limit: most bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, access: Access, body_limit: int, metrics: ApiMetrics) -> None:
        self._app, self._access, self._body_limit, self._metrics = app, access, body_limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, is_refused = time.monotonic(), 0, False
        body = _Body(receive)

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_progress.inc()
        try:
            try:
                content = await self._admitted(scope, body)
            except ApiError as error:
                is_refused = True
                await _send_refusal(error, noting_send)
            else:
                if content is not None:
                    await self._app(scope, _replayed(content, receive), noting_send)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.in_progress.dec()
            self._note(scope, status, time.monotonic() - started)
        if is_refused:
            # A connection that is closed while bytes arrive is reset, perhaps before the client has read the response.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(body.discard(), _SECONDS_TO_DISCARD)
            await send({"type": "http.response.body"})

    async def _admitted(self, scope: Scope, body: _Body) -> bytes | None:
        """The content of the body; None if the client went away.

        Raises:
            ApiError: if the request is refused.
        """
        headers = Headers(scope=scope)
        self._access.check(headers, scope["path"])
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._body_limit:
            raise self._too_large()
        try:
            content = await asyncio.wait_for(self._content(body), _SECONDS_FOR_A_BODY)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not arrive within {_SECONDS_FOR_A_BODY} s.", "timeout") from None
        return None if body.is_cut_off else content

    async def _content(self, body: _Body) -> bytes:
        parts, size = [], 0
        async for part in body.parts():
            parts.append(part)
            size += len(part)
            if size > self._body_limit:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._body_limit} bytes.", "request_too_large")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        shown = str(status) if status else "disconnected"
        self._metrics.requests.labels(route, method, shown).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        path = scope.get("raw_path", b"").partition(b"?")[0][:200].decode("ascii", "replace")
        logger.info("%s %s %s %.0f ms", method, path, shown, 1000 * seconds)


async def _send_refusal(error: ApiError, send: Send) -> None:
    """Sends the whole response but for its end, with which the server closes the connection."""
    response = error.response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})


def _replayed(content: bytes, receive: Receive) -> Receive:
    """The body at once, then what `receive` gives: the end of the connection."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay
