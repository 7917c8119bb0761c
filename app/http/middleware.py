"""Plain ASGI around every request: its id, the access log, the last resort for errors, closing connections in a drain."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.log import get_logger, request_id

log = get_logger(__name__)

HEADER = b"x-request-id"
ACCEPTED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # taken over as it is; anything else gets an id of ours


class RequestContextMiddleware:
    """Gives the request an id (taken from `X-Request-ID`, or made), puts it on the answer and on every log line.

    Args:
        access_log: write a line for every request, not only for those that failed on our side.
        on_unexpected: the answer to an error that no handler took. It is given here and not by a handler because Starlette
            calls that one outside, where the request has no id any more.
    """

    def __init__(self, app: ASGIApp, *, access_log: bool, on_unexpected: Callable[[Exception], ASGIApp]) -> None:
        self._app = app
        self._access_log = access_log
        self._on_unexpected = on_unexpected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identifier = _identifier(scope)
        token = request_id.set(identifier)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                headers.append((HEADER, identifier.encode()))
                if scope["app"].state.draining:
                    # The client finishes here and finds another instance; nothing it sends later is reset.
                    headers.append((b"connection", b"close"))
            await send(message)

        try:
            # FastAPI's GET routes do not answer HEAD; the server knows from its own scope that no body is sent.
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, receive, send_with_id)
        except Exception as error:
            answer = self._on_unexpected(error)
            if status:  # the answer has begun: the server can only close the connection
                raise
            await answer(scope, receive, send_with_id)
        finally:
            if self._access_log or status >= 500 or not status:
                milliseconds = round(1000 * (time.perf_counter() - started), 2)
                write = log.info if 0 < status < 500 else log.warning
                write("request", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)
            request_id.reset(token)


def _identifier(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == HEADER and ACCEPTED.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex
