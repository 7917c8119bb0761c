"""Plain ASGI around every request: its id, the access log, the last resort for errors, connections that must close."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.log import get_logger, request_id

log = get_logger(__name__)

HEADER = b"x-request-id"
ACCEPTED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # taken over as it is; anything else gets an id of ours
# After an answer that came before the body's end: how much more of the body is taken, so that the client reads the answer and
# is not reset while it sends. About what the socket buffers of both sides hold (Linux' tcp_wmem and tcp_rmem: 4 and 6 MiB).
MAX_LINGER_BYTES, LINGER_S = 10 * 2**20, 1.0
# So much of a body that nobody wants is cheaper to take than a new connection: the server drops it as it comes.
MAX_DROPPED_BYTES = 2**20


class RequestContextMiddleware:
    """Gives the request an id (taken from `X-Request-ID`, or made), puts it on the answer and on every log line.

    Args:
        access_log: write a line for every request, not only for those that failed on our side. An overload (503) is no failure:
            the metrics count it, and a line for each would cost most when there is least to spare.
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
        identifier = identify(scope)
        token = request_id.set(identifier)
        started = time.perf_counter()
        status = 0
        body_ended = unread = False

        async def receive_watched() -> Message:
            nonlocal body_ended
            message = await receive()
            body_ended = not message.get("more_body", False)  # also where the client has left
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status, unread, started
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                headers.append((HEADER, identifier.encode()))
                unread = not body_ended and _body_bytes(scope) > MAX_DROPPED_BYTES
                if unread or scope["app"].state.draining:
                    # In a drain the client finishes here and finds another instance; nothing it sends later is reset.
                    headers.append((b"connection", b"close"))
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})  # that is all of it, but the server does not close yet
                answered = time.perf_counter()
                await _linger(receive)
                started += time.perf_counter() - answered  # no part of the time that is logged
                message = {"type": "http.response.body"}
            await send(message)

        try:
            # FastAPI's GET routes do not answer HEAD; the server knows from its own scope that no body is sent.
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, receive_watched, send_with_id)
        except Exception as error:
            answer = self._on_unexpected(error)
            if status:  # the answer has begun: the server can only close the connection
                raise
            await answer(scope, receive_watched, send_with_id)
        finally:
            if self._access_log or (status >= 500 and status != 503) or not status:
                milliseconds = round(1000 * (time.perf_counter() - started), 2)
                write = log.info if 0 < status < 500 else log.warning
                write("request", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)
            request_id.reset(token)


def _body_bytes(scope: Scope) -> float:
    """As announced; without end where nothing says."""
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return math.inf
        if name == b"content-length":
            return int(value)  # the server has checked it
    return 0


async def _linger(receive: Receive) -> None:
    """Take some of the rest of a body, and forget it."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while num_bytes < MAX_LINGER_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def identify(scope: Scope) -> str:
    """The request's id: as it says, or one of ours."""
    for name, value in scope["headers"]:
        if name == HEADER and ACCEPTED.fullmatch(value):
            return str(value, "ascii")
    return new_id()


def new_id() -> str:
    """Of a request that brings none."""
    return f"{random.getrandbits(128):032x}"
