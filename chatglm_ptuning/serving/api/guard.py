"""What every HTTP request passes first: keys, the size of its body, metrics and the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatglm_ptuning.serving.api.errors import ApiError
from chatglm_ptuning.serving.api.metrics import ApiMetrics

logger = logging.getLogger(__name__)

_WITHOUT_KEY = ("/health",)
_ADMIN = "/v1/prefixes"
_SECONDS_FOR_A_BODY = 30


class Keys:
    """The API keys of a server.

    Args:
        api: keys that may ask for answers; without any, everyone may.
        admin: keys that may also load and unload prefixes; without any, nobody may.
    """

    def __init__(self, api: Sequence[str] = (), admin: Sequence[str] = ()) -> None:
        self._api = [_digest(key) for key in api]
        self._admin = [_digest(key) for key in admin]

    def check(self, authorization: str | None, admin: bool) -> None:
        """Checks the header `Authorization: Bearer KEY`, in a time that does not depend on the keys.

        Raises:
            ApiError: if the key is missing, unknown, or no admin key where one is needed.
        """
        if not admin and not self._api:
            return
        if admin and not self._admin:
            raise ApiError(
                403, "This server has no admin key, so prefixes cannot be changed: start it with one.", "no_admin_key"
            )
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        is_admin = _is_among(given, self._admin)
        if not _is_among(given, self._api) and not is_admin:
            raise ApiError(
                401,
                "The API key is missing or wrong: send the header Authorization: Bearer KEY.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if admin and not is_admin:
            raise ApiError(403, "This needs an admin key.", "admin_key_needed")


def _digest(key: str) -> bytes:
    # Digests have one length, so that a comparison does not tell that of a key.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _is_among(given: bytes, known: Sequence[bytes]) -> bool:
    return sum(hmac.compare_digest(given, one) for one in known) > 0


class Guard:
    """ASGI middleware. It refuses requests before their body is parsed; the log has neither texts nor keys.

    Args:
        body_limit: most bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, keys: Keys, body_limit: int, metrics: ApiMetrics) -> None:
        self._app, self._keys, self._body_limit, self._metrics = app, keys, body_limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_progress.inc()
        try:
            try:
                body = await self._admitted_body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, noting_send)
            else:
                if body is not None:
                    await self._app(scope, _replayed(body, receive), noting_send)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.in_progress.dec()
            self._note(scope, status, time.monotonic() - started)

    async def _admitted_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client went away.

        Raises:
            ApiError: if the request is refused.
        """
        path, headers = scope["path"], Headers(scope=scope)
        if path not in _WITHOUT_KEY:
            self._keys.check(headers.get("authorization"), path == _ADMIN or path.startswith(f"{_ADMIN}/"))
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._body_limit:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._body(receive), _SECONDS_FOR_A_BODY)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not arrive within {_SECONDS_FOR_A_BODY} s.", "timeout") from None

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._body_limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self._body_limit} bytes.", "request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        shown = str(status) if status else "disconnected"
        self._metrics.requests.labels(route, method, shown).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        path = scope.get("raw_path", b"").partition(b"?")[0][:200].decode("ascii", "replace")
        logger.info("%s %s %s %.0f ms", method, path, shown, 1000 * seconds)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body at once, then what `receive` gives: the end of the connection."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
