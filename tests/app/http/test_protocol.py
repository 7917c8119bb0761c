"""The short way of one image as the body: what only it can do wrong. What both have in common is tested with `both_ways`."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.http import protocol
from app.http.application import drain
from app.http.fast_path import OneImage
from tests.app.http.served import (
    CLASSIFY,
    JPEG,
    MAX_UPLOAD_BYTES,
    MODEL,
    PNG,
    Gate,
    Served,
    as_files,
    check_answer,
    check_problem,
    going,
    in_background,
    make_settings,
    running,
    until,
)
from tests.fakes import PATIENCE_S

pytestmark = pytest.mark.anyio

LARGE = {"max_upload_bytes": 2 * MAX_UPLOAD_BYTES}
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def taken(monkeypatch: pytest.MonkeyPatch) -> list[OneImage]:
    """Every request that went the short way."""
    found: list[OneImage] = []

    class Noted(OneImage):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(protocol, "OneImage", Noted)
    return found


@pytest.fixture
async def served(tiny_repository: Path) -> AsyncIterator[Served]:
    """The application with the tiny model, over a socket."""
    with going("over a socket"):
        async with running(make_settings(tiny_repository)) as served:
            yield served


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[Connection]:
    """A connection that is written to and read from by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.client.base_url.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield reader, writer
    finally:
        writer.close()


def request(body: bytes, *headers: str, version: str = "1.1", query: str = "", num_bytes: int | None = None) -> bytes:
    """One image as the body, as it goes over the wire."""
    lines = [f"POST {CLASSIFY}{query} HTTP/{version}", "Host: fovea", f"Content-Length: {num_bytes or len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_response(reader: asyncio.StreamReader) -> httpx.Response:
    """The next one on a connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in head[1:] if line)]
    length = int(dict(headers)["content-length"])
    return httpx.Response(int(head[0].split()[1]), headers=headers, content=await reader.readexactly(length))


async def test_one_image_as_the_body_takes_it_and_all_else_does_not(served: Served, taken: list[OneImage]) -> None:
    """The answers look alike."""
    ways = [
        ({"content": JPEG}, 1),
        ({"content": JPEG, "params": {"top_k": 3, "timeout_ms": 5000}}, 1),
        ({"content": JPEG, "headers": {"content-type": "application/x-www-form-urlencoded"}}, 1),
        ({"files": as_files([JPEG])}, 0),
        ({"json": {"images": []}}, 0),
        ({"content": JPEG, "headers": {"expect": "100-continue"}}, 0),
        ({"content": _in_chunks(JPEG)}, 0),
    ]
    for options, expected in ways:
        before = len(taken)
        response = await served.client.post(CLASSIFY, **options)  # type: ignore[arg-type]
        assert len(taken) - before == expected, options
        if "json" not in options:
            check_answer(response)
    served.assert_nothing_in_flight()


async def _in_chunks(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def test_with_the_access_log_every_request_has_its_line(tiny_repository: Path, taken: list[OneImage]) -> None:
    """Which the framework's way writes."""
    with going("over a socket"):
        async with running(make_settings(tiny_repository, log={"access": True})) as served:
            check_answer(await served.classify(JPEG))
    assert not taken


async def test_requests_sent_at_once_are_answered_in_their_order(served: Served, taken: list[OneImage]) -> None:
    """Good and bad ones, on the short way and on the other."""
    bodies = [JPEG, b"text", PNG, b""]
    async with connected(served) as (reader, writer):
        wire = [request(body, f"X-Request-ID: number-{index}") for index, body in enumerate(bodies)]
        writer.write(b"".join([*wire[:2], b"GET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n", *wire[2:]]))
        responses = [await read_response(reader) for _ in range(5)]
    assert [response.status_code for response in responses] == [200, 415, 200, 200, 422]
    ids = [response.headers["x-request-id"] for response in responses]
    assert [*ids[:2], *ids[3:]] == [f"number-{index}" for index in range(4)]
    assert len(taken) == 4
    for body, response in ((JPEG, responses[0]), (PNG, responses[3])):
        alone = check_answer(await served.classify(body))
        assert check_answer(response).results[0].predictions == alone.results[0].predictions
    served.assert_nothing_in_flight()


async def test_a_body_may_come_in_pieces(served: Served, taken: list[OneImage]) -> None:
    """And the next request on the connection after it."""
    async with connected(served) as (reader, writer):
        for _ in range(2):
            wire = request(JPEG)
            for start in range(0, len(wire), 400):
                writer.write(wire[start : start + 400])
                await writer.drain()
                await asyncio.sleep(0)
            check_answer(await read_response(reader))
    assert len(taken) == 2


async def test_a_client_that_leaves_is_noticed_at_once(tiny_repository: Path, gate: Gate) -> None:
    """While it sends, while it waits for an instance, and while it is computed; what had not begun never does."""
    with going("over a socket"):
        async with running(make_settings(tiny_repository, batching={"max_batch_size": 1})) as served:
            begun = len(gate.batches)
            with gate.held():
                async with connected(served) as (_, writer):
                    writer.write(request(JPEG))
                    await gate.began(begun + 1)
                    async with connected(served) as (_, other):
                        other.write(request(PNG))
                        await until(lambda: served.sample("fovea_in_flight") == 2)
                    async with connected(served) as (_, other):
                        other.write(request(PNG[:100], num_bytes=len(PNG)))
                        await until(lambda: served.sample("fovea_in_flight_bytes") == len(JPEG) + len(PNG))
                await until(lambda: served.outcome("client_error") == 3)
                served.assert_nothing_in_flight()
            await until(lambda: served.sample("fovea_skipped_total", model=MODEL, stage="0") == 1)
            assert len(gate.batches) == begun + 1
            assert served.sample("fovea_wasted_total", model=MODEL, stage="0") == 1
            check_answer(await served.classify(JPEG))


async def test_half_a_body_is_answered_when_its_time_is_over(served: Served) -> None:
    """As it is on the framework's way, and then the next request is."""
    async with connected(served) as (reader, writer):
        writer.write(request(JPEG[:100], num_bytes=len(JPEG), query="?timeout_ms=50"))
        check_problem(await read_response(reader), 504, "deadline_exceeded", "0.05 s")
        served.assert_nothing_in_flight()
        writer.write(JPEG[100:] + request(JPEG))
        check_answer(await read_response(reader))
    assert (served.outcome("timeout"), served.outcome("ok")) == (1, 1)


async def test_what_is_refused_by_its_head_is_answered_before_its_body(served: Served) -> None:
    """Once, and counted once."""
    async with connected(served) as (reader, writer):
        writer.write(request(b"", num_bytes=len(JPEG), query="?model=nobody"))
        check_problem(await read_response(reader), 404, "model_not_found", "nobody")
        writer.write(JPEG + request(JPEG))
        check_answer(await read_response(reader))
    assert served.outcome("client_error", "unknown") == 1


@pytest.mark.parametrize(("version", "headers"), [("1.0", []), ("1.1", ["Connection: close"])])
async def test_who_wants_the_connection_closed_has_it_closed(served: Served, version: str, headers: list[str]) -> None:
    """After a good answer; and it says so."""
    async with connected(served) as (reader, writer):
        writer.write(request(JPEG, *headers, version=version))
        response = await read_response(reader)
        check_answer(response)
        assert response.headers["connection"] == "close"
        assert await reader.read() == b""


async def test_in_a_drain_answers_close_their_connections(served: Served, taken: list[OneImage]) -> None:
    """The client finishes here and finds another instance."""
    async with connected(served) as (reader, writer):
        writer.write(request(JPEG))
        assert "connection" not in (await read_response(reader)).headers
        drain(served.app)
        writer.write(request(JPEG))
        response = await read_response(reader)
        check_answer(response)
        assert response.headers["connection"] == "close"
        assert await reader.read() == b""
    assert len(taken) == 2


async def test_a_defect_is_a_500_with_the_id_that_the_log_has(
    served: Served, monkeypatch: pytest.MonkeyPatch, log_lines: Any
) -> None:
    """Where the client named none, too; nothing stays held, and the connection lives."""

    def broken(*_: object) -> None:
        raise RuntimeError("the secret of the service")

    async with connected(served) as (reader, writer):
        for place in ("app.http.fast_path.answer_json", "app.http.fast_path.ask", "app.service.InferenceService.start"):
            with monkeypatch.context() as patch:
                patch.setattr(place, broken)
                writer.write(request(JPEG))
                problem = check_problem(await read_response(reader), 500, "internal_error", "log")
            (line,) = [line for line in log_lines() if line.get("request_id") == problem.request_id and "exception" in line]
            assert "the secret of the service" in line["exception"]
            served.assert_nothing_in_flight()
        writer.write(request(JPEG))
        check_answer(await read_response(reader))
    assert served.outcome("failed") + served.outcome("failed", "unknown") == 3


async def test_an_overload_is_told_before_the_body_and_costs_no_task(tiny_repository: Path, gate: Gate) -> None:
    """The body is dropped as it comes, and the connection goes on."""
    settings = make_settings(tiny_repository, limits={"max_in_flight_bytes": 2 * MAX_UPLOAD_BYTES}, http=LARGE)
    with going("over a socket"):
        async with running(settings) as served:
            begun = len(gate.batches)
            with gate.held():
                async with in_background(served.classify(JPEG + bytes(2 * MAX_UPLOAD_BYTES - len(JPEG)))) as (first,):
                    await gate.began(begun + 1)
                    tasks = len(asyncio.all_tasks())
                    async with connected(served) as (reader, writer):
                        writer.write(request(PNG[:1], "X-Request-ID: mine", num_bytes=len(PNG)))
                        response = await read_response(reader)
                        problem = check_problem(response, 503, "overloaded", "try again")
                        assert problem.request_id == "mine"
                        assert response.headers["retry-after"].isdecimal()
                        assert len(asyncio.all_tasks()) == tasks
                        gate.release()
                        check_answer(await first)
                        writer.write(PNG[1:] + request(PNG))
                        check_answer(await read_response(reader))
            assert served.outcome("overloaded") == 1
            served.assert_nothing_in_flight()


async def test_a_connection_that_has_ended_does_not_wait_for_the_collector(served: Served) -> None:
    """Answered, or left by its client while it sent: nothing holds its protocol."""
    gc.collect()
    gc.disable()
    try:
        async with connected(served) as (reader, writer):
            writer.write(request(JPEG))
            check_answer(await read_response(reader))
        async with connected(served) as (_, writer):
            writer.write(request(JPEG[:100], num_bytes=len(JPEG)))
            await until(lambda: served.sample("fovea_in_flight_bytes") > 0)
        await until(lambda: not any(type(found) is RequestResponseCycle for found in gc.get_objects()))
    finally:
        gc.enable()


async def test_any_number_of_requests_sent_at_once_may_be_refused(served: Served, gate: Gate) -> None:
    """One after the other: were each refused from within the one before, so many would be too deep."""
    count = 1500
    async with connected(served) as (reader, writer):
        with gate.held():
            writer.write(request(JPEG) + request(b"") * count)
            await gate.began(len(gate.batches) + 1)
            served.service.admission.close()  # it refuses everybody
        check_answer(await read_response(reader))
        for _ in range(count):
            check_problem(await read_response(reader), 503, "overloaded")
    assert served.outcome("overloaded", "unknown") == count
