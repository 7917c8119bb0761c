"""A refusal that is told again: to whom, for how long, and what becomes of the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Scope

from app.errors import CannotBeInTime
from app.http.application import drain
from app.http.call import Call
from app.http.protocol import Protocol
from app.http.refusals import MAX_HELD, MAX_HOLD_S, Refusals
from app.loaded_model import LoadedModel
from tests.app.http.served import JPEG, PNG, Gate, Served, check_answer, check_problem, going, make_settings, running
from tests.app.http.test_protocol import connected, read_response, request

pytestmark = pytest.mark.anyio

ERROR = CannotBeInTime("it would take too long", retry_after_s=1.5, holds=lambda: True)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def call_of(wire: bytes) -> Call:
    """What the parser makes of its head."""
    first, *lines = wire.partition(b"\r\n\r\n")[0].split(b"\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    scope: Scope = {"type": "http", "headers": headers, "http_version": first[-3:].decode()}
    return Call(scope, receive=_nothing, longest_s=60.0)


async def _nothing() -> dict[str, object]:
    raise AssertionError("nobody reads it")


def refusals(wire: bytes, clock: Clock, error: CannotBeInTime = ERROR) -> Refusals:
    """After one refusal of that request."""
    found = Refusals(2**16, clock)
    found.hold(wire, call_of(wire), error)
    return found


def test_a_refusal_is_for_the_same_head_with_any_length() -> None:
    """Whatever the bodies are."""
    wire = request(b"some bytes", "X-Api-Key: mine", query="?timeout_ms=200")
    held = refusals(wire, Clock())
    for body in (b"", b"more bytes than before"):
        other = request(body, "X-Api-Key: mine", query="?timeout_ms=200")
        assert (again := held.find(other)) is not None
        assert again.num_bytes == len(other)
        assert again.refusal.detail == str(ERROR)
        assert held.find(wire + other, len(wire)) == again
    assert held.find(request(b"x", "X-Api-Key: another", query="?timeout_ms=200")) is None
    assert held.find(request(b"x", "X-Api-Key: mine", query="?timeout_ms=300")) is None
    assert held.find(wire[:20]) is None
    assert held.find(wire.replace(b": 10", b": ten")) is None


def test_a_refusal_is_told_again_for_a_moment() -> None:
    """Each for its own."""
    clock = Clock()
    held = refusals(wire := request(b"some bytes"), clock)
    clock.now += 0.9 * MAX_HOLD_S
    held.hold(other := request(b"", query="?top_k=1"), call_of(other), ERROR)
    assert held.find(wire) is not None
    clock.now += 0.2 * MAX_HOLD_S
    assert held.find(wire) is None
    assert held.find(other) is not None
    clock.now += 0.9 * MAX_HOLD_S
    assert held.find(other) is None


def test_a_refusal_is_told_again_as_long_as_it_is_true() -> None:
    """Or somebody would be refused for whom there is time."""
    in_front = [3]
    error = CannotBeInTime("it would take too long", retry_after_s=1.5, holds=lambda: in_front[0] >= 3)
    held = refusals(wire := request(b"some bytes"), Clock(), error)
    for in_front[0], expected in ((4, True), (3, True), (2, False)):
        assert (held.find(wire) is not None) == expected


def test_a_body_that_is_too_long_to_be_dropped_has_the_usual_way() -> None:
    """Which tells that it is too long, or closes the connection."""
    held = refusals(request(b"some bytes"), Clock())
    assert held.find(request(b"", num_bytes=2**16)) is not None
    assert held.find(request(b"", num_bytes=2**16 + 1)) is None


@pytest.mark.parametrize(
    ("headers", "version", "is_held"),
    [
        (["Connection: keep-alive"], "1.1", True),
        (["Connection: close"], "1.1", False),
        (["Connection: Upgrade", "Upgrade: h2c"], "1.1", False),
        (["Connection: keep-alive"], "1.0", False),
        (["Expect: 100-continue"], "1.1", False),
        (["Transfer-Encoding: chunked"], "1.1", False),
        (["X-Request-ID: mine"], "1.1", False),
        (["X-Long: " + 4096 * "x"], "1.1", False),
    ],
)
def test_what_is_unusual_always_has_the_usual_way(headers: list[str], version: str, is_held: bool) -> None:
    """Where more than the head decides how the answer looks, or what comes after it."""
    wire = request(b"some bytes", *headers, version=version)
    assert (refusals(wire, Clock()).find(wire) is not None) == is_held


def test_only_so_many_are_held() -> None:
    """However many different heads come."""
    held = Refusals(clock=Clock())
    for number in range(3 * MAX_HELD):
        wire = request(b"", query=f"?timeout_ms={number}")
        held.hold(wire, call_of(wire), ERROR)
        assert len(held._held) <= MAX_HELD
        assert held.find(wire) is not None


@pytest.fixture
async def served(tiny_repository: Path) -> AsyncIterator[Served]:
    """Over a socket; refusals last for ever."""
    with going("over a socket"):
        async with running(make_settings(tiny_repository)) as served:
            served.app.state.refusals._clock = Clock()
            yield served


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that the forecast was asked."""
    found: list[int] = []
    choose = LoadedModel.choose

    def counted(*args: object, **options: object) -> object:
        found.append(1)
        return choose(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LoadedModel, "choose", counted)
    return found


@contextmanager
def too_late(looks: list[int]) -> Iterator[None]:
    """Nobody can be answered in time."""

    def refuse(*_: object, **__: object) -> None:
        looks.append(1)
        raise ERROR

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "choose", refuse)
        yield


def check_refused(response: httpx.Response) -> str:
    """Its id."""
    problem = check_problem(response, 503, "overloaded", "it would take too long")
    assert response.headers["retry-after"] == "2"
    assert "connection" not in response.headers
    return str(problem.request_id)


async def test_only_the_first_of_many_is_looked_at(served: Served, looks: list[int]) -> None:
    """Each has an answer and an id of its own, and is counted; on its connection and on others."""
    with too_late(looks):
        ids = set()
        for _ in range(2):
            async with connected(served) as (reader, writer):
                for body in (JPEG, PNG, JPEG):
                    writer.write(request(body))
                    ids.add(check_refused(await read_response(reader)))
    assert len(ids) == 6
    assert len(looks) == 1
    assert served.outcome("overloaded", "unknown") + served.outcome("overloaded") == 6
    served.assert_nothing_in_flight()


async def test_it_ends_with_those_in_front(
    served: Served, looks: list[int], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was refused because of them is taken when they are gone, however soon that is."""
    model = served.service.registry.get()
    monkeypatch.setattr(model.forecast, "predict_s", lambda *_: 10.0)
    wire = request(PNG, query="?timeout_ms=5000")
    async with connected(served) as (reader, writer), connected(served) as (other_reader, other_writer):
        with gate.held():
            begun = len(gate.batches)
            writer.write(request(JPEG))
            await gate.began(begun + 1)
            for _ in range(3):
                other_writer.write(wire)
                check_problem(await read_response(other_reader), 503, "overloaded", "would take about")
            assert len(looks) == 2
        check_answer(await read_response(reader))
        other_writer.write(wire)
        check_answer(await read_response(other_reader))
    assert len(looks) == 3


async def test_the_bodies_are_dropped_however_they_come(served: Served, looks: list[int]) -> None:
    """And what follows is answered: with another head at once, with this one when the moment is over."""
    async with connected(served) as (reader, writer):
        with too_late(looks):
            writer.write(request(JPEG))
            check_refused(await read_response(reader))
            wire = request(PNG)
            for cut in (len(wire) - 1, len(wire) - len(PNG), len(wire) - 10):
                writer.write(wire[:cut])
                check_refused(await read_response(reader))
                for byte in wire[cut : cut + 5]:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0)
                writer.write(wire[cut + 5 :] + request(PNG) + request(JPEG))
                for _ in range(2):
                    check_refused(await read_response(reader))
        assert len(looks) == 1
        writer.write(request(JPEG) + request(JPEG, query="?top_k=2") + request(PNG))
        check_refused(await read_response(reader))
        assert len(check_answer(await read_response(reader)).results[0].predictions or []) == 2
        answer = check_answer(await read_response(reader))  # it came behind one that was worked on
        served.app.state.refusals._clock.now += 1
        writer.write(request(PNG))
        again = check_answer(await read_response(reader))
        assert answer.results[0].predictions == again.results[0].predictions
    served.assert_nothing_in_flight()


async def test_it_waits_for_those_before_it(served: Served, looks: list[int], gate: Gate) -> None:
    """Answers come in the order of the requests."""
    with too_late(looks):
        async with connected(served) as (reader, writer):
            writer.write(request(JPEG))
            check_refused(await read_response(reader))
    async with connected(served) as (reader, writer):
        with gate.held():
            begun = len(gate.batches)
            writer.write(request(PNG, query="?top_k=2"))
            await gate.began(begun + 1)
            writer.write(request(JPEG))
            await asyncio.sleep(0.02)
        assert len(check_answer(await read_response(reader)).results[0].predictions or []) == 2
        assert len(check_answer(await read_response(reader)).results[0].predictions or []) > 2


async def test_a_body_is_never_taken_for_a_head(served: Served, looks: list[int]) -> None:
    """Whoever sends what others made may send anything; here the answer is there before the body is."""
    looks_like_a_head = request(JPEG)
    with too_late(looks):
        async with connected(served) as (reader, writer):
            writer.write(request(JPEG))
            check_refused(await read_response(reader))
            for body in (looks_like_a_head, looks_like_a_head + b"and more"):
                for header in ("X-Request-ID: mine", "X-Api-Key: mine"):  # by the parser, and without
                    writer.write(request(b"", header, num_bytes=len(body)))
                    check_refused(await read_response(reader))
                    writer.write(body)
                    await writer.drain()
                    await asyncio.sleep(0.01)
            writer.write(request(PNG))
            check_refused(await read_response(reader))
    assert served.outcome("overloaded", "unknown") + served.outcome("overloaded") == 6


async def test_it_is_the_head_of_the_request_that_was_refused(served: Served, looks: list[int]) -> None:
    """Not of the one before it that came with it."""
    with too_late(looks):
        async with connected(served) as (reader, writer):
            for _ in range(2):
                writer.write(request(JPEG, "X-Request-ID: first") + request(JPEG))
                assert check_refused(await read_response(reader)) == "first"
                assert check_refused(await read_response(reader)) != "first"


async def test_a_head_that_comes_in_pieces_is_read(served: Served, looks: list[int]) -> None:
    """It may be another one; and its end is no head."""
    with too_late(looks):
        async with connected(served) as (reader, writer):
            for _ in range(2):
                writer.write(request(JPEG)[:30])
                await asyncio.sleep(0.01)
                writer.write(request(JPEG)[30:])
                check_refused(await read_response(reader))
            writer.write(request(JPEG)[30:])
            assert (await reader.readline()).split()[1] == b"400"
    assert len(looks) == 2


async def test_any_number_sent_at_once_may_be_refused_again(served: Served, looks: list[int]) -> None:
    """In their order, one after the other."""
    count = 1500
    with too_late(looks):
        async with connected(served) as (reader, writer):
            writer.write(request(b"") * count)
            ids = {check_refused(await read_response(reader)) for _ in range(count)}
    assert len(ids) == count
    assert served.outcome("overloaded", "unknown") + served.outcome("overloaded") == count


async def test_in_a_drain_every_answer_closes_its_connection(served: Served, looks: list[int]) -> None:
    """A refusal too."""
    with too_late(looks):
        async with connected(served) as (reader, writer):
            writer.write(request(JPEG))
            check_refused(await read_response(reader))
            drain(served.app)
            writer.write(request(JPEG))
            assert (await read_response(reader)).headers["connection"] == "close"
            assert await reader.read() == b""


async def test_a_connection_is_closed_when_nothing_more_comes_on_it(
    served: Served, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a whole request or a part of one, but not as long as its body comes."""
    with too_late(looks):
        async with connected(served) as (reader, writer):
            writer.write(request(JPEG))
            check_refused(await read_response(reader))
        monkeypatch.setattr(Protocol, "timeout_keep_alive", property(lambda _: 1.0, lambda *_: None), raising=False)
        async with connected(served) as (reader, writer):
            writer.write(request(JPEG))
            check_refused(await read_response(reader))
            assert await reader.read() == b""
        async with connected(served) as (reader, writer):
            writer.write(request(b"", num_bytes=len(JPEG)))
            check_refused(await read_response(reader))
            writer.write(JPEG[:10])
            assert await reader.read() == b""
        async with connected(served) as (reader, writer):
            writer.write(request(b"", num_bytes=len(JPEG)))
            check_refused(await read_response(reader))
            for start in range(4):
                writer.write(JPEG[start : start + 1])
                await asyncio.sleep(0.4)
            writer.write(JPEG[4:] + request(PNG))
            check_refused(await read_response(reader))
    assert len(looks) == 1
