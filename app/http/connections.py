"""The limits of a connection, from its first byte on: their number, the time to a whole head, idle time, answers not read.

A `Connection` stands between the transport and uvicorn's own protocol and passes everything on as it is. It is no parser: it
learns from the application where a request begins and ends (`app.http.middleware`), and all that comes outside of one is the
head of the next. docs/adr/0028 has the reasons.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Literal, cast

from app.errors import StartupError
from app.http.errors import problem_json
from app.log import get_logger
from app.metrics import Metrics
from app.settings import HttpSettings

log = get_logger(__name__)

PERIOD_S = 0.25  # between two looks at all connections
SPARE_DESCRIPTORS = 64  # for files, and for connections that are being closed
MAX_WAITING_BYTES = 32 * 2**20  # of all heads that have not come whole, together
CLOSING_S = 5.0  # for the rest of an answer to be taken by its client, after the connection was closed
FIRST_PROBE_S = 0.02  # see `Connection._probe`
QUIET = ("idle",)  # is no trouble, so it is counted and not logged

State = Literal["head", "idle", "busy", "unread", "closing"]


class Connections:
    """All connections of a server. For one event loop.

    Args:
        max_connections: that may be open at once.
    """

    def __init__(self, settings: HttpSettings, metrics: Metrics, max_connections: int) -> None:
        self._limits_s: dict[State, tuple[float, str]] = {  # how long a connection may be in a state, and what it is closed for
            "head": (settings.head_timeout_s, "head_timeout"),
            "idle": (settings.keep_alive_s, "idle"),
            "unread": (settings.keep_alive_s, "unread"),
            "closing": (CLOSING_S, "unread"),
        }
        self.max_head_bytes = settings.max_head_bytes
        self._max_connections = max_connections
        self._metrics = metrics
        self._open: set[Connection] = set()
        self._waiting: OrderedDict[Connection, None] = OrderedDict()  # not busy; the one that has waited longest comes first
        self._num_waiting_bytes = 0
        self._unlogged: Counter[str] = Counter()
        self._logged_at = -1.0
        self._timer: asyncio.TimerHandle | None = None
        metrics.connections.set_function(lambda: len(self._open))

    @property
    def num_silent(self) -> int:
        """Connections on which no request has come yet."""
        return sum(not connection.has_asked for connection in self._open)

    def opened(self, connection: Connection) -> bool:
        """Take one in; False: there is no room, not even by closing another one that waits."""
        if len(self._open) >= self._max_connections and not self._evict("evicted"):
            self.count("refused")
            return False
        self._open.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._look)
        return True

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def waits(self, connection: Connection) -> None:
        """From now on, behind all the others that wait."""
        if connection in self._open:
            self._waiting[connection] = None
            self._waiting.move_to_end(connection)

    def works(self, connection: Connection) -> None:
        """It waits no longer."""
        self._waiting.pop(connection, None)

    def hold(self, num_bytes: int) -> None:
        """Count bytes of heads that have not come whole."""
        self._num_waiting_bytes += num_bytes
        while self._num_waiting_bytes > MAX_WAITING_BYTES and self._evict("head_bytes"):
            pass

    def release(self, num_bytes: int) -> None:
        """They have come whole, or are given up."""
        self._num_waiting_bytes -= num_bytes

    def count(self, reason: str) -> None:
        """A connection was ended. The log has one line a second at most."""
        self._metrics.connections_closed.labels(reason).inc()
        if reason in QUIET:
            return
        self._unlogged[reason] += 1
        now = asyncio.get_running_loop().time()
        if now - self._logged_at >= 1:
            self._logged_at = now
            self._say()

    def abort(self) -> None:
        """End all that are left, in the middle of whatever they do."""
        for connection in [*self._open]:
            connection.abort()

    def _evict(self, reason: str) -> bool:
        """Close the connection that has waited longest; False: none waits."""
        if (longest := next(iter(self._waiting), None)) is None:
            return False
        longest.end(reason)
        self.closed(longest)
        return True

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in [*self._open]:
            limit_s, reason = self._limits_s.get(connection.state, (float("inf"), ""))
            if now - connection.since >= limit_s:
                connection.end(reason)
        if self._unlogged and now - self._logged_at >= 1:
            self._logged_at = now
            self._say()
        going_on = self._open or self._unlogged
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._look) if going_on else None

    def _say(self) -> None:
        log.warning("connections ended", **self._unlogged)
        self._unlogged.clear()


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        make: gives uvicorn's protocol for it, which gets a dictionary that every request finds in its scope as `state`.
    """

    def __init__(self, connections: Connections, make: Callable[[dict[str, object]], asyncio.Protocol]) -> None:
        self._all = connections
        self._make = make
        self._protocol: asyncio.Protocol | None = None
        self._loop = asyncio.get_running_loop()
        self._num_running = 0  # requests
        self._num_head_bytes = 0  # since the last request
        self._body_ended = self._answering = self._may_probe = self._has_ended_sending = False
        self._eof_look: asyncio.Handle | None = None
        self._transport: asyncio.Transport
        self.has_asked = False
        self.state: State = "head"  # it is "idle" only between requests: a client connects to send one
        self.since = self._loop.time()

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if not self._all.opened(self):
            self._refuse("too_many_connections", "the service has as many connections as it may have; try again later")
            return
        self._enter("head")
        self._protocol = self._make({"connection": self})
        self._protocol.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._protocol is None:
            return
        if not self._num_running:
            if self.state == "idle":
                self._enter("head")
            self._num_head_bytes += len(data)
            self._all.hold(len(data))
            if self._transport.is_closing():  # there was no room for them
                return
        self._protocol.data_received(data)
        if not self._num_running and self.state != "closing" and self._transport.is_closing():  # it has refused what came
            too_long = self._num_head_bytes > self._all.max_head_bytes
            self._all.count("head_bytes" if too_long else "malformed")
            self._enter("closing")

    def eof_received(self) -> bool:
        """The client sends no more. It may still wait for an answer, so the connection stays open for that."""
        self._has_ended_sending = True
        if self._protocol is not None:
            self._protocol.eof_received()
            self._look_after_eof()
        return self._protocol is not None

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()
            self._enter("unread")

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()
            self._enter("busy" if self._num_running else "idle")

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._all.closed(self)
        protocol, self._protocol = self._protocol, None  # they hold each other
        if protocol is not None:
            protocol.connection_lost(exc)

    # The application's side.

    def request_began(self, *, has_body: bool, version: str) -> None:
        """The head of a request has come."""
        self._forget_head()
        if self._eof_look is not None and self._num_running == 0:
            self._look_after_eof()
        self._num_running += 1
        self.has_asked = True
        self._answering = False
        self._body_ended = not has_body
        self._may_probe = version != "1.0"
        if self.state not in ("closing", "unread"):
            self._enter("busy")

    def refused(self, reason: str) -> None:
        """It is refused by its head, and its answer ends the connection."""
        self._all.count(reason)

    def body_ended(self) -> None:
        """All of its body has come."""
        self._body_ended = True

    def answer_began(self) -> None:
        """The first bytes of its answer are being written."""
        self._answering = True

    def request_ended(self) -> None:
        """It has been answered."""
        self._num_running -= 1
        if self._num_running or self._protocol is None:
            return
        if self.state == "busy":
            self._enter("closing" if self._transport.is_closing() else "idle")
        if self._has_ended_sending:
            self._look_after_eof()

    # The connections' side.

    def end(self, reason: str) -> None:
        """Close it for that."""
        self._all.count(reason)
        if self.state == "closing" or self._transport.get_write_buffer_size():  # what the client does not take would keep it
            self._transport.abort()
        elif reason == "head_timeout" and self._num_head_bytes and (self._body_ended or not self.has_asked):
            self._refuse("head_timeout", "the head of the request was not complete in time")
        else:
            self._transport.close()
            self._enter("closing")
        self._forget_head()

    def abort(self) -> None:
        """Close it now, whatever it is at."""
        self._transport.abort()

    def _enter(self, state: State) -> None:
        self.state = state
        self.since = self._loop.time()
        if state == "busy":
            self._all.works(self)
        else:
            self._all.waits(self)

    def _forget_head(self) -> None:
        self._all.release(self._num_head_bytes)
        self._num_head_bytes = 0

    def _refuse(self, code: str, detail: str) -> None:
        """With an answer that no request has asked for, and the end of the connection."""
        status, body = problem_json(code, detail, None)
        phrase = HTTPStatus(status).phrase
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/problem+json\r\ncontent-length: {len(body)}\r\n"
        self._transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self._transport.close()
        self._enter("closing")

    def _look_after_eof(self) -> None:
        """As soon as what has come by now has begun."""
        if self._eof_look is not None:
            self._eof_look.cancel()
        self._eof_look = self._loop.call_soon(self._after_eof)

    def _after_eof(self) -> None:
        """Close it as soon as there is nothing to answer, or a body that does not come to its end."""
        self._eof_look = None  # it holds this connection
        if self._protocol is None or self._transport.is_closing():
            return
        if not self._num_running or not self._body_ended:
            self._transport.close()
        else:
            self._probe(FIRST_PROBE_S)

    def _probe(self, delay_s: float) -> None:
        """Find out whether a client that sends no more still listens.

        A client that closed its sending half and one that has left look alike. One that has left answers whatever it is sent
        by a reset, and `connection_lost` is called; the other takes an interim answer, which every client since HTTP/1.1
        must be ready for (RFC 9110, 15.2), and waits on.
        """
        if self._num_running and not self._answering and self._may_probe and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._loop.call_later(delay_s, self._probe, 2 * delay_s)


def connection_limit(max_connections: int) -> int:
    """How many connections may be open at once.

    The limit of open files is raised as far as the system lets it, and the number lowered to what it leaves room for.

    Args:
        max_connections: as many as are wanted.

    Raises:
        StartupError: the limit leaves no room for a single one.
    """
    try:
        import resource
    except ImportError:  # not on Windows, where sockets are no files
        return max_connections
    needed = _num_open_files() + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < max_connections + needed:
        wanted = max_connections + needed
        soft_before, soft = soft, wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft = soft_before
    if soft == resource.RLIM_INFINITY:
        return max_connections
    if soft <= needed:
        raise StartupError(f"the limit of open files, {soft}, leaves no room for connections; raise it (ulimit -n)")
    room = min(max_connections, soft - needed)
    if room < max_connections:
        log.warning("fewer connections than asked for, because of the limit of open files", connections=room, limit=soft)
    return room


def _num_open_files() -> int:
    with suppress(OSError):
        return sum(1 for _ in Path("/dev/fd").iterdir())
    return SPARE_DESCRIPTORS
