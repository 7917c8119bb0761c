"""The load generator accounts for every request exactly once, whatever the server does with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from tests.bench.http_client import (
    Answer,
    Connection,
    Head,
    Outcome,
    UnsupportedAnswer,
    build_request,
    connect,
    media_type,
    parse_head,
)
from tests.bench.load import closed_loop, open_loop, poisson_arrivals
from tests.bench.load_result import LoadResult, Recorder

Reply = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request as the test server got it, and the ways to answer."""

    def __init__(self, number: int, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.number = number  # over all connections, from 0
        self.head = head
        self.body = body
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, status: int = 200, body: bytes = b"{}", headers: bytes = b"") -> None:
        await self.send(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n" % (status, len(body), headers) + body)

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        self._writer.transport.abort()


class ScriptedServer:
    """Reads requests on a free port and leaves each to `reply`; a context manager."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self.num_connections = 0
        self.requests: list[Exchange] = []
        self.url = ""

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/classify?top_k=1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """No more connections, and the open ones end."""
        self.stop_listening()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()
        await asyncio.gather(*self._serving)

    def stop_listening(self) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                exchange = Exchange(len(self.requests), head, await reader.readexactly(length), writer)
                self.requests.append(exchange)
                await self._reply(exchange)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self._writers.discard(writer)
            self._serving.discard(task)


def run_closed(reply: Reply, bodies: tuple[bytes, ...] = (b"one", b"two"), **options: Any) -> tuple[LoadResult, ScriptedServer]:
    """A closed loop of 20 requests on 4 connections against a scripted server."""

    async def main() -> tuple[LoadResult, ScriptedServer]:
        async with ScriptedServer(reply) as server:
            given = {"connections": 4, "num_requests": 20, "timeout_s": 10.0} | options
            return await closed_loop(server.url, bodies, **given), server

    return asyncio.run(main())


def happened(result: LoadResult) -> dict[Outcome, int]:
    return {outcome: number for outcome, number in result.counts.items() if number}


def test_closed_loop_keeps_its_connections() -> None:
    """Each request is sent whole and once, on as many connections as asked for."""
    result, server = run_closed(lambda exchange: exchange.answer())

    assert happened(result) == {Outcome.OK: 20}
    assert (result.num_connections, server.num_connections) == (4, 4)
    assert [exchange.body for exchange in server.requests].count(b"one") == 10
    assert server.requests[0].head.startswith(b"POST /v1/classify?top_k=1 HTTP/1.1\r\n")
    assert np.all(result.latencies > 0)


def test_closed_loop_runs_for_a_time() -> None:
    """What is in flight at the end is waited for; only the window is measured."""
    result, server = run_closed(lambda exchange: exchange.answer(), num_requests=None, seconds=0.05, ramp_s=0.02)

    assert {Outcome.OK: len(server.requests)} == happened(result)
    assert result.measured_s == (0.02, 0.02 + 0.05)
    assert result.elapsed_s >= 0.07
    assert len(result.latencies) <= result.num_requests


def test_bodies_are_kept_when_asked_for() -> None:
    """An answer can be matched with the image it belongs to."""
    result, _ = run_closed(lambda exchange: exchange.answer(body=b"about " + exchange.body), keep_bodies=True)

    for answer, image in zip(result.answers, result.image, strict=True):
        assert b"about " + (b"one", b"two")[image] == answer.body


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.OK),
        (204, Outcome.OK),
        (503, Outcome.OVERLOADED),
        (422, Outcome.CLIENT_ERROR),
        (429, Outcome.CLIENT_ERROR),
        (500, Outcome.SERVER_ERROR),
        (504, Outcome.SERVER_ERROR),
        (302, Outcome.SERVER_ERROR),
    ],
)
def test_status_decides_the_outcome(status: int, outcome: Outcome) -> None:
    """An error answer ends its request and leaves the connection usable."""
    body = b"" if status == 204 else b"{}"
    result, server = run_closed(lambda exchange: exchange.answer(status, body), connections=1, num_requests=3)

    assert {outcome: 3} == happened(result)
    assert server.num_connections == 1


def test_connection_close_is_followed_by_another() -> None:
    """A server that ends the connection with its answer loses no request."""

    async def reply(exchange: Exchange) -> None:
        await exchange.answer(headers=b"Connection: close\r\n")
        exchange.close()

    result, server = run_closed(reply)

    assert happened(result) == {Outcome.OK: 20}
    assert (result.num_connections, server.num_connections) == (20, 20)


def test_close_without_a_word_between_requests_is_no_error() -> None:
    """A server may end an idle keep-alive connection; the client opens another for its next request."""

    async def main() -> None:
        async with ScriptedServer(lambda exchange: exchange.answer()) as server:
            connection = await opened(server)
            first = await connection.request(build_request(server.url, b"x"), timeout_s=10)
            server.requests[0].close()
            while connection.usable:  # noqa: ASYNC110 - production code needs no event for it
                await asyncio.sleep(0)
        assert Outcome.OK is first.outcome

    asyncio.run(main())


async def opened(server: ScriptedServer, *, keep_bodies: bool = False) -> Connection:
    port = int(server.url.split(":")[2].split("/")[0])
    connection = await connect("127.0.0.1", port, timeout_s=10, keep_bodies=keep_bodies)
    assert isinstance(connection, Connection)
    return connection


def exchange_once(reply: Reply, *, timeout_s: float = 10) -> Answer:
    """One request on one connection."""

    async def main() -> Answer:
        async with ScriptedServer(reply) as server:
            connection = await opened(server, keep_bodies=True)
            try:
                return await connection.request(build_request(server.url, b"x"), timeout_s=timeout_s)
            finally:
                connection.close()

    return asyncio.run(main())


def test_answer_in_single_bytes() -> None:
    """However the answer is cut into packets, it is read whole."""
    body = bytes(range(256))

    async def reply(exchange: Exchange) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Request-ID: 1\r\ncontent-length:256\r\n\r\n" + body:
            await exchange.send(bytes([byte]))
            await asyncio.sleep(0)

    assert body == exchange_once(reply).body


def test_interim_answer_is_not_the_answer() -> None:
    """1xx is read over."""

    async def reply(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        await exchange.answer(body=b"yes")

    assert exchange_once(reply).body == b"yes"


def test_body_that_ends_with_the_connection() -> None:
    """Without Content-Length the body lasts until the server closes."""

    async def reply(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it")
        exchange.close()

    answer = exchange_once(reply)

    assert (answer.outcome, answer.body) == (Outcome.OK, b"all of it")


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
@pytest.mark.parametrize("ending", [Exchange.close, Exchange.reset])
def test_half_an_answer_is_a_reset(sent: bytes, ending: Callable[[Exchange], None]) -> None:
    """The connection was there and the request sent, but no full answer came."""

    async def reply(exchange: Exchange) -> None:
        await exchange.send(sent)
        ending(exchange)

    assert Outcome.RESET is exchange_once(reply).outcome


def test_reset_costs_only_its_own_request() -> None:
    """The loop goes on with a new connection."""

    async def reply(exchange: Exchange) -> None:
        if exchange.number % 5 == 0:
            exchange.reset()
        else:
            await exchange.answer()

    result, _ = run_closed(reply)

    assert happened(result) == {Outcome.OK: 16, Outcome.RESET: 4}


def test_no_answer_in_time() -> None:
    """A request that is not answered ends as a timeout, and its connection with it."""

    async def reply(exchange: Exchange) -> None:
        if exchange.number:
            await exchange.answer()

    result, server = run_closed(reply, connections=1, num_requests=3, timeout_s=0.5)

    assert happened(result) == {Outcome.TIMEOUT: 1, Outcome.OK: 2}
    assert server.num_connections == 2


def test_nobody_listens() -> None:
    """No connection accepted is refused, not reset; every request is still counted."""

    async def main() -> LoadResult:
        async with ScriptedServer(lambda exchange: exchange.answer()) as server:
            await server.stop()
            return await closed_loop(server.url, [b"x"], connections=2, num_requests=4)

    result = asyncio.run(main())

    assert happened(result) == {Outcome.REFUSED: 4}
    assert result.num_connections == 0
    assert np.isnan(result.percentile_s(50))


def test_loop_ends_with_a_server_that_goes_away() -> None:
    """With `stop_when_refused`, a server that drains and leaves ends the load; what it answered is counted as OK."""

    async def main() -> tuple[LoadResult, int]:
        async def reply(exchange: Exchange) -> None:
            if exchange.number < 30:
                await exchange.answer()
                return
            leaving.set()
            await exchange.answer(headers=b"Connection: close\r\n")
            exchange.close()

        leaving = asyncio.Event()
        async with ScriptedServer(reply) as server:
            load = asyncio.create_task(closed_loop(server.url, [b"x"], connections=3, seconds=60, stop_when_refused=True))
            await leaving.wait()
            server.stop_listening()
            return await load, len(server.requests)

    result, num_answered = asyncio.run(main())

    assert num_answered == result.counts[Outcome.OK]
    assert result.counts[Outcome.REFUSED] == 3
    assert num_answered + 3 == result.num_requests


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"X" * 70_000,
    ],
)
def test_what_cannot_be_read_stops_the_run(answer: bytes) -> None:
    """A measurement that would be wrong is refused, not counted as something else."""
    with pytest.raises(UnsupportedAnswer):
        run_closed(lambda exchange: exchange.send(answer))


def test_surplus_bytes_end_the_connection() -> None:
    """Bytes that nobody asked for are never taken for the next answer."""

    async def surplus(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n")

    result, server = run_closed(surplus, connections=1, num_requests=3)

    assert happened(result) == {Outcome.OK: 3}
    assert server.num_connections == 3


def test_cancelled_caller_leaves_no_connection_behind() -> None:
    """An answer that comes after its caller left is not given to the next one."""

    async def main() -> None:
        got = asyncio.Event()

        async def reply(_: Exchange) -> None:
            got.set()

        async with ScriptedServer(reply) as server:
            connection = await opened(server)
            task = asyncio.create_task(connection.request(build_request(server.url, b"x"), timeout_s=10))
            await got.wait()
            task.cancel()
            await asyncio.wait([task])
            assert not connection.usable
            with pytest.raises(RuntimeError):
                await connection.request(b"", timeout_s=1)

    asyncio.run(main())


def run_open(reply: Reply, **options: Any) -> tuple[LoadResult, ScriptedServer]:
    async def main() -> tuple[LoadResult, ScriptedServer]:
        async with ScriptedServer(reply) as server:
            given = {"rate": 200.0, "seconds": 0.3, "seed": 7, "timeout_s": 10.0} | options
            return await open_loop(server.url, [b"one", b"two"], **given), server

    return asyncio.run(main())


def test_open_loop_sends_the_whole_schedule() -> None:
    """Every scheduled request is sent, in the order of the images, and counted."""
    result, server = run_open(lambda exchange: exchange.answer())

    assert {Outcome.OK: len(poisson_arrivals(200, 0.3, 7))} == happened(result)
    assert len(server.requests) == result.num_requests
    assert np.allclose(np.sort(result.due_s), poisson_arrivals(200, 0.3, 7))
    assert np.all(result.sent_s >= result.due_s)


def test_open_loop_counts_waiting_from_the_schedule() -> None:
    """A request that waits for a connection is late from when it was due, not from when it was sent."""
    held = asyncio.Event()

    async def reply(exchange: Exchange) -> None:
        if exchange.number == 0:
            asyncio.get_running_loop().call_later(0.4, held.set)
        await held.wait()
        await exchange.answer()

    result, server = run_open(reply, max_connections=1)

    assert server.num_connections == 1
    assert np.all(result.finished_s >= 0.4)  # none before the server let go, 0.4 s after the first request came
    assert np.allclose(result.latencies, result.finished_s - result.due_s)
    assert result.latencies.max() > 0.35


def test_open_loop_does_not_wait_for_answers() -> None:
    """Requests arrive while others are unanswered: each takes a connection of its own."""
    everyone = len(poisson_arrivals(200, 0.3, 7))
    all_there = asyncio.Event()

    async def reply(exchange: Exchange) -> None:
        if exchange.number + 1 == everyone:
            all_there.set()
        await all_there.wait()
        await exchange.answer()

    result, server = run_open(reply)

    assert {Outcome.OK: everyone} == happened(result)
    assert everyone == server.num_connections


def test_open_loop_counts_what_a_server_ends_at_once() -> None:
    """Whether the connection had ended when the request was to be sent, or ends then."""

    async def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def main() -> LoadResult:
        server = await asyncio.start_server(end, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            async with asyncio.timeout(30):
                return await open_loop(url, [b"one"], rate=200.0, seconds=0.3, seed=7)

    result = asyncio.run(main())
    assert happened(result) == {Outcome.RESET: len(poisson_arrivals(200, 0.3, 7))}


def test_open_loop_ends_with_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are too many open files: it says so instead of waiting for what was never sent."""

    async def fail(*_: object, **__: object) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr("tests.bench.load.connect", fail)
    with pytest.raises(OSError, match="too many"):
        run_open(lambda exchange: exchange.answer())


def test_poisson_arrivals() -> None:
    """The mean rate is as asked, gaps are exponential (standard deviation = mean), and a seed repeats itself."""
    arrivals = np.array(poisson_arrivals(500, 40, seed=1))
    gaps = np.diff(arrivals)

    assert arrivals[0] > 0
    assert arrivals[-1] < 40
    assert pytest.approx(20_000, rel=0.03) == len(arrivals)  # 4 standard deviations of a Poisson count
    assert pytest.approx(1, rel=0.05) == gaps.std() / gaps.mean()
    assert arrivals.tolist() == poisson_arrivals(500, 40, seed=1)
    assert arrivals.tolist() != poisson_arrivals(500, 40, seed=2)


def test_figures_are_read_off_the_window() -> None:
    """Latencies by when a request was due, answers per second by when it finished, counts over everything."""
    recorder = Recorder(started_at=100.0)
    rows = [
        (Outcome.OK, 100.5, 101.5),  # due before the window, finished in it
        (Outcome.OK, 101.0, 101.2),
        (Outcome.OVERLOADED, 101.1, 101.15),
        (Outcome.OK, 102.9, 103.3),  # due in the window, finished after it
    ]
    for outcome, due_at, finished_at in rows:
        recorder.add(Answer(outcome, finished_at), due_at=due_at, sent_at=due_at + 0.01, image=0)

    result = recorder.result(measured_s=(1.0, 3.0), elapsed_s=3.3, cpu_s=0.004)

    assert np.allclose([0.2, 0.4], result.latencies)
    assert np.allclose(0.01, result.lags)
    assert result.ok_per_s == 1.0  # two answers in two seconds
    assert happened(result) == {Outcome.OK: 3, Outcome.OVERLOADED: 1}
    assert (result.counts_due[Outcome.OK], result.counts_due[Outcome.OVERLOADED]) == (2, 1)
    assert pytest.approx(0.3) == result.percentile_s(50)
    assert pytest.approx(0.001) == result.cpu_per_request_s


def test_head_is_read_whatever_its_case() -> None:
    """Names are matched whole, in any case; HTTP/1.0 closes unless it says otherwise."""
    assert Head(200, 7, keep_alive=True) == parse_head(b"HTTP/1.1 200 OK\r\nX-Content-Length: 9\r\nCONTENT-LENGTH:  7")
    assert Head(503, 0, keep_alive=False) == parse_head(b"HTTP/1.1 503 No\r\nConnection: Close\r\nContent-Length: 0")
    assert Head(200, 1, keep_alive=False) == parse_head(b"HTTP/1.0 200 OK\r\nContent-Length: 1")
    assert Head(200, None, keep_alive=False) == parse_head(b"HTTP/1.1 200 OK\r\nDate: x")


def test_media_type_by_first_bytes() -> None:
    """The body says what it is; what is not an image is sent as bytes."""
    assert media_type(b"\xff\xd8\xff\xe0") == "image/jpeg"
    assert media_type(b"RIFF\x00\x00\x00\x00WEBPVP8 ") == "image/webp"
    assert media_type(b"hello") == "application/octet-stream"


def test_either_a_time_or_a_number() -> None:
    """A closed loop without an end, or with two, is a mistake of the caller."""
    with pytest.raises(ValueError, match="either seconds or num_requests"):
        asyncio.run(closed_loop("http://127.0.0.1:1/", [b"x"], connections=1))
    with pytest.raises(ValueError, match="plain HTTP"):
        asyncio.run(closed_loop("https://127.0.0.1:1/", [b"x"], connections=1, num_requests=1))
