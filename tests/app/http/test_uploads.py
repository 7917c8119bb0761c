"""Bodies under the limits: what is read, what is not, and what is given back."""

from __future__ import annotations

import asyncio
import binascii
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from starlette.types import Message, Receive

from app.http import middleware
from app.http.uploads import BASE64_SLICE, MAX_FIELD_BYTES, MAX_FORM_FIELDS, read_body
from tests.app.http.served import (
    CLASSIFY,
    JPEG,
    MAX_UPLOAD_BYTES,
    MODEL,
    MULTIPART,
    PNG,
    Gate,
    Served,
    as_files,
    base64_of,
    check_answer,
    check_problem,
    in_background,
    make_settings,
    multipart,
    part,
    running,
    until,
)
from tests.fakes import PATIENCE_S

pytestmark = pytest.mark.anyio

CHUNK = b"\xff" * 2**16


class RawRequest:
    """A POST to /v1/classify message by message, as a server would pass it on.

    Args:
        ends: the body ends after the chunks; otherwise the client goes silent.
    """

    def __init__(
        self, served: Served, chunks: Iterable[bytes], headers: Iterable[tuple[bytes, bytes]] = (), *, ends: bool = True
    ) -> None:
        self._served = served
        self._ended = not ends
        self._chunks = iter(chunks)
        self._headers = list(headers)
        self.num_received = 0  # messages asked for before the answer
        self.num_lingered = 0  # and after it
        self.sent: list[Message] = []
        self.leave = asyncio.Event()  # the client closes the connection

    async def run(self) -> int:
        """The status of the answer."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CLASSIFY,
            "raw_path": CLASSIFY.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": self._headers,
            "client": ("127.0.0.1", 1),
            "server": ("fovea", 80),
        }
        await self._served.app(scope, self._receive, self._send)
        status: int = self.sent[0]["status"]
        return status

    async def _receive(self) -> Message:
        if self.sent:
            self.num_lingered += 1
        else:
            self.num_received += 1
        chunk = next(self._chunks, None)
        if chunk is not None:
            return {"type": "http.request", "body": chunk, "more_body": True}
        if not self._ended:
            self._ended = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


def endless() -> Iterable[bytes]:
    """More than anybody accepts."""
    while True:
        yield CHUNK


async def chunked(body: bytes) -> AsyncIterator[bytes]:
    """A body whose length is not announced."""
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


async def test_of_a_body_announced_as_too_large_nothing_is_read(served: Served) -> None:
    """Content-Length alone decides."""
    request = RawRequest(served, endless(), [(b"content-length", str(MAX_UPLOAD_BYTES + 1).encode())])
    assert await request.run() == 413
    assert request.num_received == 0
    served.assert_nothing_in_flight()


async def test_an_answer_before_the_end_of_the_body_closes_the_connection(served: Served) -> None:
    """The whole answer goes out at once; then a little more is taken, so that the client is not reset before it reads."""
    request = RawRequest(served, endless(), [(b"content-length", str(10**9).encode())])
    assert await request.run() == 413
    assert (b"connection", b"close") in request.sent[0]["headers"]
    assert [message.get("more_body", False) for message in request.sent[1:]] == [True, False]
    assert request.sent[1]["body"].startswith(b"{")
    assert request.num_lingered * len(CHUNK) == middleware.MAX_LINGER_BYTES
    for body, status in ((JPEG, 200), (b"text", 415)):
        response = await served.classify(body)
        assert status == response.status_code
        assert "connection" not in response.headers


@pytest.mark.parametrize("leaves", [True, False])
async def test_nobody_is_waited_for_after_an_early_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Whether the client leaves or is silent, the connection is closed."""
    monkeypatch.setattr(middleware, "LINGER_S", PATIENCE_S if leaves else 0.01)
    request = RawRequest(served, [CHUNK], [(b"content-length", str(10**9).encode())], ends=False)
    if leaves:
        request.leave.set()
    assert await asyncio.wait_for(request.run(), PATIENCE_S / 2) == 413
    assert len(request.sent) == 3
    assert request.num_lingered == 2


async def test_of_a_body_without_length_no_more_is_read_than_the_limit(served: Served) -> None:
    """An endless body ends at the first chunk beyond the limit."""
    request = RawRequest(served, endless(), [(b"transfer-encoding", b"chunked")])
    assert await request.run() == 413
    assert MAX_UPLOAD_BYTES // len(CHUNK) + 1 == request.num_received
    served.assert_nothing_in_flight()


async def test_a_body_larger_than_announced_is_held_to_the_limit(served: Served) -> None:
    """A server should not pass it on; should it, it is counted all the same."""
    request = RawRequest(served, endless(), [(b"content-length", b"10")])
    assert await request.run() == 413
    served.assert_nothing_in_flight()


@pytest.mark.parametrize("announced", [True, False])
async def test_the_limit_itself_is_accepted(tiny_repository: Path, announced: bool) -> None:
    """A body of exactly `max_upload_bytes` is read; one byte more is refused."""
    async with running(make_settings(tiny_repository, http={"max_upload_bytes": len(JPEG)})) as served:
        for body, status in ((JPEG, 200), (JPEG + b"\0", 413)):
            response = await served.client.post(CLASSIFY, content=body if announced else chunked(body))
            assert status == response.status_code
        check_problem(response, 413, "payload_too_large", str(len(JPEG)))
        served.assert_nothing_in_flight()


@pytest.mark.parametrize("body", [JPEG, multipart(part(JPEG), part(PNG))])
async def test_a_body_in_chunks_is_put_together(served: Served, body: bytes) -> None:
    """Whatever its form, and wherever it is cut."""
    headers = {"content-type": MULTIPART} if body is not JPEG else {}
    response = await served.client.post(CLASSIFY, content=chunked(body), headers=headers)
    check_answer(response, num_results=1 if body is JPEG else 2)


async def test_as_many_images_as_allowed_are_accepted(tiny_repository: Path) -> None:
    """`max_images_per_request` itself is fine, one more is not; in both forms."""
    async with running(make_settings(tiny_repository, http={"max_images_per_request": 3})) as served:
        for count, status in ((3, 200), (4, 413)):
            for response in (
                await served.client.post(CLASSIFY, files=as_files([JPEG] * count)),
                await served.client.post(CLASSIFY, json={"images": [base64_of(JPEG)] * count}),
            ):
                assert status == response.status_code
                if status == 413:
                    check_problem(response, 413, "payload_too_large", "3 images")


async def test_as_many_form_fields_as_allowed_are_accepted(served: Served) -> None:
    """Said again, a field counts again; the last one is taken."""
    body = multipart(*[part(b"2", "top_k", None)] * (MAX_FORM_FIELDS - 1), part(b"1", "top_k", None), part(JPEG))
    answer = check_answer(await served.classify(body, headers={"content-type": MULTIPART}))
    assert answer.results[0].predictions is not None
    assert len(answer.results[0].predictions) == 1


@pytest.mark.parametrize("charset", ["punycode", "utf-7", "idna", "utf-16", "raw_unicode_escape", "no-such-charset", "rot13"])
async def test_the_charset_of_a_form_is_not_used(served: Served, charset: str) -> None:
    """RFC 7578 does not know it, and some of Python's codecs take seconds for some kilobytes, or raise errors of their own."""
    body = multipart(part(b"a" + b"-z" * 5000, "model", None), part(JPEG))
    response = await served.classify(body, headers={"content-type": f"{MULTIPART}; charset={charset}"})
    check_problem(response, 404, "model_not_found", "'a-z-z")


async def test_a_field_is_no_place_for_a_file(served: Served) -> None:
    """What is too long for any parameter is refused before it is looked at."""
    body = multipart(part(b"a" * (MAX_FIELD_BYTES + 1), "model", None), part(JPEG))
    response = await served.classify(body, headers={"content-type": MULTIPART})
    check_problem(response, 422, "invalid_request", str(MAX_FIELD_BYTES))


@pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,"])
async def test_base64_is_decoded_slice_by_slice_on_a_decode_thread(
    served: Served, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """It holds the interpreter lock while it runs: not on the event loop, and not for long. Only the end may be padded."""
    image = JPEG + b"\0" * BASE64_SLICE  # behind its end a JPEG may have anything
    threads: list[str] = []

    def a2b_base64(text: str, *, strict_mode: bool) -> bytes:
        threads.append(threading.current_thread().name)
        assert len(text) <= BASE64_SLICE
        return decode(text, strict_mode=strict_mode)

    decode = binascii.a2b_base64
    monkeypatch.setattr(binascii, "a2b_base64", a2b_base64)
    check_answer(await served.client.post(CLASSIFY, json={"images": [prefix + base64_of(image)]}))
    assert len(threads) == 2
    assert all(name.startswith("decode") for name in threads)
    padded = "A" * (BASE64_SLICE - 1) + "=" + base64_of(JPEG)
    check_problem(await served.client.post(CLASSIFY, json={"images": [prefix + padded]}), 422, "invalid_image", "base64")


async def test_a_client_that_leaves_during_its_upload_costs_nothing(served: Served) -> None:
    """What it had sent is given back, and it is counted as the client's own doing."""
    request = RawRequest(served, [JPEG[:100]], [(b"content-length", b"1000")], ends=False)
    running_request = asyncio.ensure_future(request.run())
    await until(lambda: served.sample("fovea_in_flight_bytes") == 1000)
    request.leave.set()
    assert await running_request == 422
    assert served.outcome("client_error") == 1
    served.assert_nothing_in_flight()


async def test_a_client_that_leaves_before_its_answer_is_not_computed_for(tiny_repository: Path, gate: Gate) -> None:
    """Its image leaves the queue, its permit comes back at once, and the others are answered."""
    async with running(make_settings(tiny_repository, batching={"max_batch_size": 1})) as served:
        begun = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(begun + 1)
                leaving = RawRequest(served, [PNG])
                async with in_background(leaving.run(), served.classify(PNG)) as (gone, last):
                    await until(lambda: served.sample("fovea_queue_size", model=MODEL, stage="0") == 2)
                    assert served.sample("fovea_in_flight") == 3
                    leaving.leave.set()
                    await until(gone.done)
                    assert served.sample("fovea_in_flight") == 2
                    gate.release()
                    check_answer(await first)
                    check_answer(await last)
        assert served.sample("fovea_skipped_total", model=MODEL, stage="0") == 1
        assert [stage for stage, _ in gate.batches[begun:]].count(0) == 2
        assert served.outcome("client_error") == 1
        served.assert_nothing_in_flight()


async def test_a_client_that_leaves_while_its_image_is_computed_gives_its_permit_back(
    tiny_repository: Path, gate: Gate
) -> None:
    """The run goes on, its answer is nobody's, and the next request is answered."""
    async with running(make_settings(tiny_repository)) as served:
        begun = len(gate.batches)
        leaving = RawRequest(served, [JPEG])
        with gate.held():
            async with in_background(leaving.run()) as (gone,):
                await gate.began(begun + 1)
                leaving.leave.set()
                await until(gone.done)
                served.assert_nothing_in_flight()
        check_answer(await served.classify(JPEG))
        assert (await served.client.get("/health/ready")).status_code == 200


@pytest.mark.parametrize("body", [b"[" * 10**6, b'{"images": [' + b"[]," * 10**5 + b"[]]}", b'{"a":' * 10**5])
async def test_a_nested_json_body_is_refused_before_it_is_parsed(served: Served, body: bytes) -> None:
    """A megabyte of brackets would be a million objects, made on the event loop."""
    response = await served.client.post(CLASSIFY, content=body, headers={"Content-Type": "application/json"})
    check_problem(response, 422, "invalid_request", "nested")


@pytest.mark.parametrize("pieces", [[], [b""], [b"abc"], [b"a"] * 1000, [bytes([i % 256]) * (i % 7) for i in range(500)]])
async def test_a_body_is_the_sum_of_its_pieces(served: Served, pieces: list[bytes]) -> None:
    """However they come."""
    with served.service.admission.admit() as permit:
        assert await read_body(_receive(pieces), "", permit, 2**20) == b"".join(pieces)


async def test_a_body_of_tiny_pieces_takes_little_more_than_it_is_long(served: Served) -> None:
    """A hundred thousand of one byte each would take four million, were they kept."""
    with served.service.admission.admit() as permit:
        tracemalloc.start()
        body = await read_body(_receive(b"a" for _ in range(100_000)), "", permit, 2**20)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(body) == 100_000
    assert peak < 10 * len(body)


def _receive(pieces: Iterable[bytes]) -> Receive:
    """As a server gives them, and the end of the body after them."""
    left = iter(pieces)

    async def receive() -> Message:
        piece = next(left, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    return receive
