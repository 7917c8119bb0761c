"""What is bounded before there is a request: heads, time, idle connections, their number, answers that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.http import connections
from tests.app.http.conftest import LogLines
from tests.app.http.served import (
    JPEG,
    PNG,
    Gate,
    Served,
    check_answer,
    check_problem,
    going,
    in_background,
    make_settings,
    running,
    until,
)
from tests.app.http.wire import connected, read_all, read_response, request

pytestmark = pytest.mark.anyio

LIVE = b"GET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n"
HALF_HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: fo"


@asynccontextmanager
async def serving(root: Path, **http: Any) -> AsyncIterator[Served]:
    """The application behind its server, with these settings of HTTP."""
    with going("over a socket"):
        async with running(make_settings(root, http=http)) as served:
            yield served


def ended(served: Served, reason: str) -> float:
    """Connections that were ended for that."""
    return served.sample("fovea_connections_closed_total", reason=reason)


def head_of(num_bytes: int) -> bytes:
    """A request head that is exactly so long."""
    padding = num_bytes - len(LIVE) - len("X-Padding: \r\n")
    return LIVE.replace(b"\r\n\r\n", b"\r\nX-Padding: " + b"a" * padding + b"\r\n\r\n")


async def test_a_head_may_be_as_long_as_is_said_and_not_one_byte_longer(tiny_repository: Path) -> None:
    """One that came whole has an answer with an id, and its connection ends."""
    async with serving(tiny_repository, max_head_bytes=2000) as served:
        async with connected(served) as (reader, writer):
            writer.write(head_of(2000))
            assert (await read_response(reader)).status_code == 200
            writer.write(head_of(2001))
            (refused,) = await read_all(reader)
        check_problem(refused, 431, "head_too_large", "2000 bytes")
        assert refused.headers["connection"] == "close"
        assert ended(served, "head_bytes") == 1


async def test_a_head_without_end_is_stopped_while_it_comes(tiny_repository: Path, log_lines: LogLines) -> None:
    """However much of it is sent; the log has a line a second at most."""
    async with serving(tiny_repository, max_head_bytes=2000) as served:
        for _ in range(5):
            async with connected(served) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\nHost: fovea\r\n")
                for _ in range(3):
                    writer.write(b"X-A: " + b"a" * 1000 + b"\r\n")
                    await asyncio.sleep(0.01)
                (refused,) = await read_all(reader)
            assert (refused.status_code, refused.text) == (400, "Invalid HTTP request received.")
        assert ended(served, "head_bytes") == 5
        assert (await served.client.get("/health/live")).status_code == 200
    assert 1 <= len([line for line in log_lines() if line["event"] == "connections ended"]) <= 2
    assert 1 <= len([line for line in log_lines() if line["event"].startswith("Invalid HTTP")]) <= 2


async def test_a_head_that_does_not_come_whole_in_time_is_given_up(tiny_repository: Path) -> None:
    """A byte now and then gains no time; who has sent nothing at all is only closed."""
    async with serving(tiny_repository, head_timeout_s=0.3) as served:
        async with connected(served) as (reader, writer), connected(served) as (silent, _):
            writer.write(HALF_HEAD)
            slow = asyncio.ensure_future(_trickle(writer))
            (refused,) = await read_all(reader)
            slow.cancel()
            assert await silent.read() == b""
        assert (refused.status_code, refused.json()["code"]) == (408, "head_timeout")
        assert ended(served, "head_timeout") == 2
        assert served.sample("fovea_connections") == 0


async def _trickle(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"a")
        await asyncio.sleep(0.05)


async def test_the_head_of_a_later_request_has_as_much_time(tiny_repository: Path) -> None:
    """From its first byte on."""
    async with serving(tiny_repository, head_timeout_s=0.3, keep_alive_s=60) as served, connected(served) as (reader, writer):
        writer.write(LIVE)
        assert (await read_response(reader)).status_code == 200
        await asyncio.sleep(0.6)  # that is no head yet
        writer.write(HALF_HEAD)
        (refused,) = await read_all(reader)
        assert refused.status_code == 408


async def test_a_body_and_its_computation_are_no_head(tiny_repository: Path, gate: Gate) -> None:
    """They have the time budget of the request."""
    async with serving(tiny_repository, head_timeout_s=0.2, keep_alive_s=0.2) as served, connected(served) as (reader, writer):
        writer.write(request(JPEG[:100], num_bytes=len(JPEG)))
        await asyncio.sleep(0.8)
        with gate.held():
            writer.write(JPEG[100:])
            await asyncio.sleep(0.8)
        check_answer(await read_response(reader))


async def test_an_idle_connection_is_closed_when_its_time_is_over(tiny_repository: Path, log_lines: LogLines) -> None:
    """Which is no trouble, so it is counted and not logged."""
    async with serving(tiny_repository, keep_alive_s=0.3) as served:
        async with connected(served) as (reader, writer):
            writer.write(LIVE)
            assert (await read_response(reader)).status_code == 200
            assert await reader.read() == b""
        assert ended(served, "idle") == 1
    assert not [line for line in log_lines() if line["event"] == "connections ended"]


async def test_beyond_the_most_connections_the_one_that_waited_longest_goes(tiny_repository: Path) -> None:
    """Whoever sends a request meanwhile moves to the end of the line."""
    async with serving(tiny_repository, max_connections=3) as served, AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(connected(served)) for _ in range(3)]
        for _, writer in (first, second, third):
            writer.write(HALF_HEAD)
        await until(lambda: served.sample("fovea_connections") == 3)
        first[1].write(b"vea\r\nContent-Length: 0\r\n\r\n")
        assert (await read_response(first[0])).status_code == 422
        fourth = await stack.enter_async_context(connected(served))
        assert await second[0].read() == b""
        for reader, writer in (first, fourth):
            writer.write(LIVE)
            assert (await read_response(reader)).status_code == 200
        assert (ended(served, "evicted"), ended(served, "refused")) == (1, 0)
        assert served.sample("fovea_connections") == 3
        third[1].write(b"vea\r\nContent-Length: 0\r\n\r\n")
        assert (await read_response(third[0])).status_code == 422


async def test_who_is_being_worked_for_is_never_closed_for_another(tiny_repository: Path, gate: Gate) -> None:
    """The new one is told to come again."""
    async with serving(tiny_repository, max_connections=2) as served:
        begun = len(gate.batches)
        with gate.held():
            async with connected(served) as first, connected(served) as second:
                for _, writer in (first, second):
                    writer.write(request(JPEG))
                await gate.began(begun + 1)
                await until(lambda: served.sample("fovea_in_flight") == 2)
                async with connected(served) as (reader, _):
                    (refused,) = await read_all(reader)
                assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
                gate.release()
                for reader, _ in (first, second):
                    check_answer(await read_response(reader))
        assert ended(served, "refused") == 1


async def test_all_unfinished_heads_together_have_only_so_much_room(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that has waited longest makes room; whoever sends a whole head is answered."""
    monkeypatch.setattr(connections, "MAX_WAITING_BYTES", 50_000)
    async with serving(tiny_repository) as served, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(served)) for _ in range(5)]
        for _, writer in wires:
            writer.write(head_of(20_000).replace(b"X-Padding", b"Connection: close\r\nX-Padding")[:-1])
        await until(lambda: ended(served, "head_bytes") == 3)
        check_answer(await served.classify(JPEG))
        for _, writer in wires:
            writer.write(b"\n")
        answers = [await read_all(reader) for reader, _ in wires]
        assert sum(len(found) for found in answers) == 2


async def test_who_does_not_read_its_answers_is_closed(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would keep them, and its connection, for ever."""
    async with serving(tiny_repository, keep_alive_s=0.3) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.client.base_url.port, limit=1000)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            metrics = b"GET /metrics HTTP/1.1\r\nHost: fovea\r\n\r\n"
            while not ended(served, "unread"):
                writer.write(metrics * 20)
                await asyncio.sleep(0.01)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
        await until(lambda: ended(served, "unread") >= 1)
        check_answer(await served.classify(PNG))
        assert reader is not None


BOTH = ["Content-Length: 5", "Transfer-Encoding: chunked"]


@pytest.mark.parametrize("headers", [BOTH, BOTH[::-1]], ids=["length first", "length last"])
async def test_a_body_with_two_ends_is_refused(served_over_socket: Served, headers: list[str]) -> None:
    """A proxy in front may have taken the other one, and the rest for the next request."""
    async with connected(served_over_socket) as (reader, writer):
        lines = ["POST /v1/classify HTTP/1.1", "Host: fovea", *headers, "", ""]
        writer.write("\r\n".join(lines).encode() + b"0\r\n\r\n" + LIVE)
        (refused,) = await read_all(reader)
    check_problem(refused, 400, "malformed_request", "Content-Length", "Transfer-Encoding")
    assert refused.headers["connection"] == "close"


HEAD = "POST /v1/classify HTTP/1.1\r\nHost: fovea\r\n"
BROKEN = {
    "no host": "GET /health/live HTTP/1.1\r\n\r\n",
    "two hosts": "GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "HTTP/0.9": "GET /health/live\r\n\r\n",
    "HTTP/2 preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no colon": "GET / HTTP/1.1\r\nHost: fovea\r\nno header\r\n\r\n",
    "blank before the colon": "GET / HTTP/1.1\r\nHost : fovea\r\n\r\n",
    "length -1": HEAD + "Content-Length: -1\r\n\r\n",
    "length +1": HEAD + "Content-Length: +1\r\n\r\na",
    "length 0x1": HEAD + "Content-Length: 0x1\r\n\r\na",
    "lengths 1 and 2": HEAD + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length of 5000 digits": HEAD + f"Content-Length: {'9' * 5000}\r\n\r\n",
    "gzip, chunked": HEAD + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": "POST /v1/classify HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a zero byte": HEAD + "X-A: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "a carriage return": HEAD + "X-A: a\rb\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_no_http_is_refused_once_and_ends_the_connection(served_over_socket: Served, broken: str) -> None:
    """What follows it on the wire is not read as a request."""
    async with connected(served_over_socket) as (reader, writer):
        writer.write(BROKEN[broken].encode("latin-1") + LIVE)
        answers = await read_all(reader)
    assert [400 <= answer.status_code < 502 for answer in answers] == [True]
    served_over_socket.assert_nothing_in_flight()
    assert (await served_over_socket.client.get("/health/live")).status_code == 200


BROKEN_CHUNKS = {
    "no number": b"x\r\nabc\r\n0\r\n\r\n",
    "a negative number": b"-1\r\nabc\r\n0\r\n\r\n",
    "too short": b"2\r\nabc\r\n0\r\n\r\n",
    "too long": b"4\r\nabc\r\n0\r\n\r\n",
    "a huge number": b"f" * 30 + b"\r\nabc\r\n",
    "a line without end": b"1" * 70_000,
}


@pytest.mark.parametrize("broken", BROKEN_CHUNKS)
async def test_a_broken_chunk_is_an_error_and_never_another_request(served_over_socket: Served, broken: str) -> None:
    """Whatever stands behind it."""
    async with connected(served_over_socket) as (reader, writer):
        writer.write(HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + BROKEN_CHUNKS[broken] + LIVE)
        writer.write_eof()
        answers = await read_all(reader)
    assert len(answers) <= 1
    assert all(400 <= answer.status_code < 500 for answer in answers)
    served_over_socket.assert_nothing_in_flight()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health/live HTTP/1.1\nHost: fovea\n\n",
        b"GET /health/live HTTP/1.1\r\nHost: fovea\r\nX-A: one\r\n two\r\n\r\n",
        b"\r\n\r\nGET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n",
    ],
    ids=["bare LF", "a folded line", "empty lines before"],
)
async def test_what_may_be_read_in_two_ways_is_one_request_or_none(served_over_socket: Served, head: bytes) -> None:
    """RFC 9112 leaves it to the server; the answers still belong to the requests."""
    async with connected(served_over_socket) as (reader, writer):
        writer.write(head + request(JPEG, "Connection: close"))
        answers = await read_all(reader)
    assert [answer.status_code for answer in answers] in ([200, 200], [400])


async def test_many_requests_sent_at_once_are_all_answered_in_order(served_over_socket: Served) -> None:
    """Images, and looks at the health; tests/integration has more of them."""
    served = served_over_socket
    async with connected(served) as (reader, writer):
        sending = asyncio.ensure_future(_send(writer, [request(JPEG, f"X-Request-ID: id-{i}") for i in range(40)]))
        ids = [check_answer(await read_response(reader)).request_id for _ in range(40)]
        await sending
        assert [f"id-{i}" for i in range(40)] == ids
        sending = asyncio.ensure_future(_send(writer, [LIVE * 1000] * 2))
        num_answers, tail = 0, b""
        while num_answers < 2000:
            tail += await reader.read(2**16)
            num_answers += tail.count(b'{"live":true}')
            tail = tail[tail.rfind(b"}") + 1 :]
        await sending
        assert (num_answers, tail) == (2000, b"")
    served.assert_nothing_in_flight()


async def _send(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()


async def test_a_hundred_slow_bodies_cost_the_others_nothing(tiny_repository: Path) -> None:
    """They are ended with their time budget."""
    async with serving(tiny_repository, request_timeout_s=1.0) as served, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(connected(served)) for _ in range(100)]
        for _, writer in slow:
            writer.write(request(JPEG[:10], num_bytes=len(JPEG)))
        await until(lambda: served.sample("fovea_in_flight_bytes") == 100 * len(JPEG))
        async with in_background(*(served.classify(JPEG) for _ in range(10))) as good:
            for answer in good:
                check_answer(await answer)
        for reader, _ in slow:
            check_problem(await read_response(reader), 504, "deadline_exceeded")
        served.assert_nothing_in_flight()
