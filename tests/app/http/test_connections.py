"""Connections, by hand over a socket: order, ends, limits. What routes answer behind them is tested with `both_ways`."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from app.http.application import drain
from tests.app.http.served import (
    JPEG,
    MAX_UPLOAD_BYTES,
    MODEL,
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


@pytest.fixture
def served(served_over_socket: Served) -> Served:
    return served_over_socket


LARGE = {"max_upload_bytes": 2 * MAX_UPLOAD_BYTES}
PER_CONNECTION = {"Connection", "H11Protocol", "RequestResponseCycle", "Call", "_Exchange"}


async def test_requests_sent_at_once_are_answered_in_their_order(served: Served) -> None:
    """Good and bad ones, and of other routes."""
    bodies = [JPEG, b"text", PNG, b""]
    async with connected(served) as (reader, writer):
        wire = [request(body, f"X-Request-ID: number-{index}") for index, body in enumerate(bodies)]
        writer.write(b"".join([*wire[:2], b"GET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n", *wire[2:]]))
        responses = [await read_response(reader) for _ in range(5)]
    assert [response.status_code for response in responses] == [200, 415, 200, 200, 422]
    ids = [response.headers["x-request-id"] for response in responses]
    assert [*ids[:2], *ids[3:]] == [f"number-{index}" for index in range(4)]
    for body, response in ((JPEG, responses[0]), (PNG, responses[3])):
        alone = check_answer(await served.classify(body))
        assert check_answer(response).results[0].predictions == alone.results[0].predictions
    served.assert_nothing_in_flight()


async def test_a_body_may_come_in_pieces(served: Served) -> None:
    """And the next request on the connection after it."""
    async with connected(served) as (reader, writer):
        for _ in range(2):
            wire = request(JPEG)
            for start in range(0, len(wire), 400):
                writer.write(wire[start : start + 400])
                await writer.drain()
                await asyncio.sleep(0)
            check_answer(await read_response(reader))


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
    """And then the next request is."""
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


async def test_in_a_drain_answers_close_their_connections(served: Served) -> None:
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


async def test_a_defect_is_a_500_with_the_id_that_the_log_has(
    served: Served, monkeypatch: pytest.MonkeyPatch, log_lines: Any
) -> None:
    """Where the client named none, too; nothing stays held, and the connection lives."""

    def broken(*_: object) -> None:
        raise RuntimeError("the secret of the service")

    async with connected(served) as (reader, writer):
        for place in ("app.http.routes.classify.classified", "app.http.call.take_apart", "app.service._terms"):
            with monkeypatch.context() as patch:
                patch.setattr(place, broken)
                writer.write(request(JPEG))
                problem = check_problem(await read_response(reader), 500, "internal_error", "log")
            (line,) = [line for line in log_lines() if line.get("request_id") == problem.request_id and "exception" in line]
            assert "the secret of the service" in line["exception"]
            served.assert_nothing_in_flight()
        writer.write(request(JPEG))
        check_answer(await read_response(reader))
    # The first was classified; what failed is only its JSON.
    assert (served.outcome("failed") + served.outcome("failed", "unknown"), served.outcome("ok")) == (2, 2)


async def test_an_overload_is_told_before_the_body(tiny_repository: Path, gate: Gate) -> None:
    """The body is dropped as it comes, and the connection goes on."""
    settings = make_settings(tiny_repository, limits={"max_in_flight_bytes": 2 * MAX_UPLOAD_BYTES}, http=LARGE)
    with going("over a socket"):
        async with running(settings) as served:
            begun = len(gate.batches)
            with gate.held():
                async with in_background(served.classify(JPEG + bytes(2 * MAX_UPLOAD_BYTES - len(JPEG)))) as (first,):
                    await gate.began(begun + 1)
                    async with connected(served) as (reader, writer):
                        writer.write(request(PNG[:1], "X-Request-ID: mine", num_bytes=len(PNG)))
                        response = await read_response(reader)
                        problem = check_problem(response, 503, "overloaded", "try again")
                        assert problem.request_id == "mine"
                        assert response.headers["retry-after"].isdecimal()
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
        await until(lambda: not [found for found in gc.get_objects() if type(found).__name__ in PER_CONNECTION])
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


async def test_a_client_that_ends_its_half_of_the_connection_gets_its_answers(served: Served, gate: Gate) -> None:
    """All that it asked for, however long they take; then the connection ends."""
    async with connected(served) as (reader, writer):
        begun = len(gate.batches)
        with gate.held():
            writer.write(request(JPEG) + b"GET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n" + request(PNG))
            writer.write_eof()
            await gate.began(begun + 1)
            await asyncio.sleep(0.1)  # meanwhile it is asked whether it is still there
        answers = [answer for answer in await read_all(reader) if answer.status_code != 100]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    served.assert_nothing_in_flight()


async def test_a_client_that_ends_its_half_within_a_body_is_let_go(served: Served) -> None:
    """The rest cannot come any more."""
    async with connected(served) as (reader, writer):
        writer.write(request(JPEG[:100], num_bytes=len(JPEG)))
        writer.write_eof()
        assert await read_all(reader) == []
    await until(lambda: served.outcome("client_error", "unknown") + served.outcome("client_error") == 1)
    served.assert_nothing_in_flight()


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.0"])
async def test_an_upgrade_is_ignored(served: Served, upgrade: str) -> None:
    """As RFC 9110 7.8 lets a server; the body is read, and a body that looks like a request is none."""
    headers = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAEAAEAAAAIAAAAB"]
    async with connected(served) as (reader, writer):
        writer.write(request(JPEG, *headers))
        check_answer(await read_response(reader))
        smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request(b"", *headers, num_bytes=len(smuggled)))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(smuggled)
        check_problem(await read_response(reader), 415, "unsupported_image")
        writer.write(request(JPEG, "Connection: close"))
        (answer,) = await read_all(reader)
        check_answer(answer)
