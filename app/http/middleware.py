"""Plain ASGI around every request: its id, the access log, and closing connections while the service drains."""

from __future__ import annotations

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.log import get_logger, request_id

log = get_logger(__name__)

HEADER = b"x-request-id"
ACCEPTED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # taken over as it is; anything else gets an id of ours


class RequestContextMiddleware:
    """Gives the request an id (taken from `X-Request-ID`, or made), puts it on the answer and on every log line.

    Args:
        access_log: write a line for every request, not only for those that failed on our side.
    """

    def __init__(self, app: ASGIApp, *, access_log: bool) -> None:
        self._app = app
        self._access_log = access_log
        self.draining = False

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
            await self._app(scope, receive, send_with_id)
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
