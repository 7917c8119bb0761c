"""A minimal HTTP/1.1 keep-alive client that costs little CPU, because it shares the machine with what it measures.

One `Connection` carries one request at a time: a pre-serialised request leaves in one write, and of the answer only the
status, the length and `Connection: close` are read. Every request ends in exactly one `Outcome`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, cast
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 64 * 2**10
SEND_BUFFER_BYTES = 256 * 2**10  # a whole photo in one write: the kernel's first size (16 KiB) takes several wake-ups
_MEDIA_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"))


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"  # 2xx
    OVERLOADED = "overloaded"  # 503
    CLIENT_ERROR = "client_error"  # 4xx
    SERVER_ERROR = "server_error"  # any other status
    TIMEOUT = "timeout"  # no full answer, or no connection, in time
    RESET = "reset"  # connected and sent, but the connection ended before the full answer
    GIVEN_UP = "given_up"  # by us, before an answer came: the connection was closed
    REFUSED = "refused"  # no connection was accepted: nothing was sent


class UnsupportedAnswer(Exception):
    """The answer is not in the small part of HTTP/1.1 that this client reads; the measurement would be wrong."""


class Answer(NamedTuple):
    """What came back for one request; status 0 and no body when nothing complete came."""

    outcome: Outcome
    finished_at: float  # time.monotonic(), seconds: uvloop's loop time only counts milliseconds
    status: int = 0
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Head:
    """What is read from an answer's head; length None: the body ends with the connection."""

    status: int
    length: int | None
    keep_alive: bool


def media_type(data: bytes) -> str:
    """The media type told by the first bytes of an image; application/octet-stream where they tell none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "image/tiff"
    return next((kind for magic, kind in _MEDIA_TYPES if data.startswith(magic)), "application/octet-stream")


def address(url: str) -> tuple[str, int]:
    """Host and port of an `http://` URL; ValueError for any other scheme."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r}: the load generator speaks plain HTTP, so the URL must start with http://host")
    return parts.hostname, parts.port or 80


def build_request(url: str, body: bytes, content_type: str | None = None) -> bytes:
    """One POST with head and body, ready to be sent as it is."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = (
        f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type or media_type(body)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


def parse_head(head: bytes) -> Head:
    """Read status line and headers, without the empty line at their end.

    Raises:
        UnsupportedAnswer: not HTTP/1.x, or a transfer encoding.
    """
    lower = head.lower()
    if not lower.startswith(b"http/1.") or not lower[9:12].isdigit():
        raise UnsupportedAnswer(f"not an HTTP/1.x answer: {head[:40]!r}")
    if _header(lower, b"transfer-encoding"):
        raise UnsupportedAnswer("the answer has a Transfer-Encoding; only Content-Length is understood")
    status, connection, length = int(lower[9:12]), _header(lower, b"connection"), _header(lower, b"content-length")
    keep_alive = b"close" not in connection if lower[7:8] == b"1" else b"keep-alive" in connection
    if status in (204, 304):
        return Head(status, 0, keep_alive)
    if not length:
        return Head(status, None, keep_alive=False)
    if not length.isdigit():
        raise UnsupportedAnswer(f"Content-Length is {length!r}")
    return Head(status, int(length), keep_alive)


def _header(lower: bytes, name: bytes) -> bytes:
    start = lower.find(b"\r\n" + name + b":")
    if start < 0:
        return b""
    start += len(name) + 3
    end = lower.find(b"\r\n", start)
    return lower[start : end if end >= 0 else len(lower)].strip()


def _outcome(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome.OK
    if status == 503:
        return Outcome.OVERLOADED
    return Outcome.CLIENT_ERROR if 400 <= status < 500 else Outcome.SERVER_ERROR


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time. Open it with `connect`."""

    def __init__(self, *, keep_bodies: bool = False) -> None:
        self.usable = False  # True while another request can be sent
        self._loop = asyncio.get_running_loop()
        self._keep_bodies = keep_bodies
        self._buffer = bytearray()
        self._head: Head | None = None
        self._on_end: Callable[[Answer | UnsupportedAnswer], None] | None = None  # of the request in flight
        self._gives_up = False
        self._ends_at = self._timer_at = 0.0  # by the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def start(
        self,
        payload: bytes,
        on_end: Callable[[Answer | UnsupportedAnswer], None],
        *,
        timeout_s: float,
        give_up: bool = False,
    ) -> None:
        """Send one pre-serialised request; a callback and no task waits for its end, whatever that is.

        Args:
            on_end: called once, when another request may be sent; UnsupportedAnswer: this client cannot read the answer.
            give_up: the end of the time is this caller's wish, and no fault of the server.
        """
        if not self.usable or self._on_end is not None:
            raise RuntimeError("the connection is closed or has a request in flight")
        self._on_end, self._gives_up = on_end, give_up
        self._ends_at = self._loop.time() + timeout_s
        if self._timer is None or self._ends_at < self._timer_at:  # one timer does for many requests
            self._set_timer()
        self._transport.write(payload)

    async def request(self, payload: bytes, *, timeout_s: float, give_up: bool = False) -> Answer:
        """As `start`, and wait for the answer.

        Raises:
            UnsupportedAnswer: this client cannot read the answer.
        """
        waiter: asyncio.Future[Answer] = self._loop.create_future()

        def on_end(answer: Answer | UnsupportedAnswer) -> None:
            if waiter.done():
                return
            if isinstance(answer, Answer):
                waiter.set_result(answer)
            else:
                waiter.set_exception(answer)

        self.start(payload, on_end, timeout_s=timeout_s, give_up=give_up)
        try:
            return await waiter
        except asyncio.CancelledError:  # the caller has left: the answer would be taken for the next one's
            self._abort(Outcome.RESET)
            raise

    def close(self) -> None:
        """End the connection; a request in flight ends as reset."""
        self._end(Outcome.RESET)
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        if self._on_end is None:  # nothing was asked, so what follows could not be matched to a request
            self._abort(Outcome.RESET)
            return
        self._buffer += data
        try:
            while self._head is None:
                end = self._buffer.find(b"\r\n\r\n")
                if end < 0:
                    if len(self._buffer) > MAX_HEAD_BYTES:
                        raise UnsupportedAnswer(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
                    return
                head = parse_head(bytes(self._buffer[:end]))
                del self._buffer[: end + 4]
                self._head = head if head.status >= 200 else None  # 1xx announces the answer and is not it
        except UnsupportedAnswer as error:
            self._fail(error)
            return
        if self._head.length is not None and len(self._buffer) >= self._head.length:
            self._complete(self._head, self._head.length)

    def eof_received(self) -> None:
        self.usable = False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._head is not None and self._head.length is None:
            self._complete(self._head, len(self._buffer))
        self._end(Outcome.RESET)

    def _complete(self, head: Head, length: int) -> None:
        answer = Answer(
            _outcome(head.status), time.monotonic(), head.status, bytes(self._buffer[:length]) if self._keep_bodies else b""
        )
        surplus = len(self._buffer) > length
        self._buffer.clear()
        self._head = None
        if surplus or not head.keep_alive:
            self.usable = False
            self._transport.close()
        self._resolve(answer)

    def _resolve(self, answer: Answer | UnsupportedAnswer) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(answer)

    def _end(self, outcome: Outcome) -> None:
        self.usable = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._resolve(Answer(outcome, time.monotonic()))

    def _abort(self, outcome: Outcome) -> None:
        self._transport.abort()
        self._end(outcome)

    def _fail(self, error: UnsupportedAnswer) -> None:
        self.usable = False
        self._transport.abort()
        self._resolve(error)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._ends_at
        self._timer = self._loop.call_at(self._timer_at, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        if self._on_end is None:
            return
        if self._loop.time() < self._ends_at:  # it was set for a request that has ended meanwhile
            self._set_timer()
        else:
            self._abort(Outcome.GIVEN_UP if self._gives_up else Outcome.TIMEOUT)


async def connect(host: str, port: int, *, timeout_s: float, keep_bodies: bool = False) -> Connection | Outcome:
    """Open a connection, or say why there is none: refused or timeout.

    Raises:
        OSError: it is this side's fault (too many open files, no free port, unknown host).
    """
    try:
        async with asyncio.timeout(timeout_s):
            transport, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(keep_bodies=keep_bodies), host, port
            )
    except TimeoutError:
        return Outcome.TIMEOUT
    except OSError as error:
        # No errno: asyncio's "Multiple exceptions", when a name has several addresses and none of them answers.
        if isinstance(error, ConnectionError) or error.errno is None:
            return Outcome.REFUSED
        raise
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return connection
