"""Plain ASGI around every request: its id, the limits of its head, the access log, the last resort for errors."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.connections import Connection
from app.http.errors import problem, unexpected_problem
from app.log import get_logger, request_id

log = get_logger(__name__)

HEADER = b"x-request-id"
ACCEPTED = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # taken over as it is; anything else gets an id of ours
# After an answer that came before the body's end: how much more of the body is taken, so that the client reads the answer and
# is not reset while it sends. About what the socket buffers of both sides hold (Linux' tcp_wmem and tcp_rmem: 4 and 6 MiB).
MAX_LINGER_BYTES, LINGER_S = 10 * 2**20, 1.0
# So much of a body that nobody wants is cheaper to take than a new connection: the server drops it as it comes.
MAX_DROPPED_BYTES = 2**20
REFUSED_FOR = {"head_too_large": "head_bytes", "malformed_request": "malformed"}  # code -> reason of the metric


class RequestContextMiddleware:
    """Gives the request an id (taken from `X-Request-ID`, or made), puts it on the answer and on every log line.

    Args:
        max_head_bytes: of a request's head. The server stops a longer one while it comes; this is for one that came at once.
        access_log: write a line for every request, not only for those that failed on our side. An overload (503) is no failure:
            the metrics count it, and a line for each would cost most when there is least to spare.
    """

    def __init__(self, app: ASGIApp, *, max_head_bytes: int, access_log: bool) -> None:
        self._app = app
        self._max_head_bytes = max_head_bytes
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = _Head.of(scope)
        token = request_id.set(head.identifier)
        started = time.perf_counter()
        refusal = self._refusal(head)
        exchange = _Exchange(scope, receive, send, head, refused=None if refusal is None else REFUSED_FOR[refusal[0]])
        try:
            app = self._app if refusal is None else problem(*refusal)
            await app(_inner(scope), exchange.receive, exchange.send)
        except Exception as error:
            answer = unexpected_problem(error)
            if exchange.status:  # the answer has begun: the server can only close the connection
                raise
            await answer(scope, exchange.receive, exchange.send)
        finally:
            status = exchange.status
            if self._access_log or (status >= 500 and status != 503) or not status:
                milliseconds = round(1000 * (time.perf_counter() - started - exchange.lingered_s), 2)
                write = log.info if 0 < status < 500 else log.warning
                write("request", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)
            request_id.reset(token)
            exchange.end()

    def _refusal(self, head: _Head) -> tuple[str, str] | None:
        """Code and detail of the answer to a request that is refused by its head alone, whatever it is for."""
        if head.num_bytes > self._max_head_bytes:
            return "head_too_large", f"the head of the request has more than the {self._max_head_bytes} bytes accepted"
        if head.version not in ("1.0", "1.1"):
            return "malformed_request", f"the request is in HTTP/{head.version}; send it in HTTP/1.1"
        if head.is_ambiguous:
            return "malformed_request", "send Content-Length or Transfer-Encoding, not both; HTTP/1.0 has no Transfer-Encoding"
        return None


@dataclass(frozen=True, slots=True)
class _Head:
    """What is looked at in every request's head."""

    identifier: str
    num_bytes: int  # as it came, but for blanks that nobody needs
    num_body_bytes: float  # as announced; infinite where nothing says how many
    version: str
    is_ambiguous: bool  # where its body ends: two of the servers that it passes may see two different requests

    @classmethod
    def of(cls, scope: Scope) -> _Head:
        identifier, length = None, None
        is_chunked = False
        target = len(scope["raw_path"]) + (1 + len(scope["query_string"]) if scope["query_string"] else 0)
        num_bytes = len(scope["method"]) + target + len("  HTTP/1.1\r\n\r\n")
        for name, value in scope["headers"]:
            num_bytes += len(name) + len(value) + len(": \r\n")
            if name == b"content-length":
                length = int(value)  # the server has checked it
            elif name == b"transfer-encoding":
                is_chunked = True
            elif name == HEADER and identifier is None and ACCEPTED.fullmatch(value):
                identifier = str(value, "ascii")
        return cls(
            identifier=identifier if identifier is not None else new_id(),
            num_bytes=num_bytes,
            num_body_bytes=math.inf if is_chunked else length or 0,
            version=scope["http_version"],
            is_ambiguous=is_chunked and (length is not None or scope["http_version"] == "1.0"),
        )


class _Exchange:
    """One request and its answer, as the server's `receive` and `send` pass them.

    Args:
        refused: why the request is refused by its head, as `fovea_connections_closed_total` says it; then its answer is the
            last one on the connection. None: it is not refused so.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, head: _Head, *, refused: str | None) -> None:
        self.status = 0  # until the answer begins
        self.lingered_s = 0.0  # after the answer, for the rest of a body
        self._receive = receive
        self._send = send
        self._head = head
        self._state = scope["app"].state
        self._must_close = refused is not None
        self._body_ended = self._unread = False
        self._connection: Connection | None = scope.get("state", {}).get("connection")
        if self._connection is not None:
            self._connection.request_began(has_body=head.num_body_bytes > 0, version=head.version)
            if refused is not None:
                self._connection.refused(refused)

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):  # also where the client has left
            self._body_ended = True
            if self._connection is not None:
                self._connection.body_ended()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            headers.append((HEADER, self._head.identifier.encode()))
            self._unread = not self._body_ended and self._head.num_body_bytes > MAX_DROPPED_BYTES
            if self._unread or self._must_close or self._state.draining:
                # In a drain the client finishes here and finds another instance; nothing it sends later is reset.
                headers.append((b"connection", b"close"))
            if self._connection is not None:
                self._connection.answer_began()
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})  # that is all of it, but the server does not close yet
            answered = time.perf_counter()
            await _linger(self._receive)
            self.lingered_s = time.perf_counter() - answered
            message = {"type": "http.response.body"}
        await self._send(message)

    def end(self) -> None:
        """It is over, whatever came of it."""
        if self._connection is not None:
            self._connection.request_ended()


def _inner(scope: Scope) -> Scope:
    """As the routes know it: FastAPI's GET routes do not answer HEAD, nor a path with a slash at its end.

    The server knows from its own scope that an answer to HEAD has no body.
    """
    path: str = scope["path"]
    has_slash = len(path) > 1 and path.endswith("/")
    if scope["method"] != "HEAD" and not has_slash:
        return scope
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": path.rstrip("/") or "/"}


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


def new_id() -> str:
    """The id of a request that brings none."""
    return f"{random.getrandbits(128):032x}"
