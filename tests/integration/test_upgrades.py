"""A request that offers to go on in another protocol is an ordinary request, byte for byte: `Upgrade` and what follows it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest

from tests.app.http.served import CLASSIFY
from tests.e2e.servers import Server
from tests.fakes import PATIENCE_S
from tests.images import make_jpeg
from tests.integration.conftest import Reference, labels_in

pytestmark = pytest.mark.integration

JPEG = make_jpeg()
LOOKS_LIKE_A_REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
PAUSE_S = 0.3  # enough for the server to read the head alone
OFFERS = {
    "h2c": ("Connection: Upgrade", "Upgrade: h2c"),
    "h2c as Java and curl offer it": (
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    ),
    "websocket": (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "unknown": ("Connection: Upgrade", "Upgrade: something-new/1.0"),
}


class Wire:
    """A connection to the server, written and read by hand."""

    def __init__(self, connection: socket.socket, stream: BinaryIO) -> None:
        self._connection = connection
        self._stream = stream  # one for all answers: none is lost in a buffer

    def send(self, body: bytes, *headers: str, pause_s: float = 0) -> None:
        """POST it, with a pause between head and body."""
        lines = [f"POST {CLASSIFY} HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(body)}"]
        head = "\r\n".join([*lines, "", ""]).encode()
        if pause_s:
            self._connection.sendall(head)
            time.sleep(pause_s)
            self._connection.sendall(body)
        else:
            self._connection.sendall(head + body)

    def read_answer(self) -> tuple[int, Any]:
        """Status and JSON of the next one."""
        protocol, status, _ = self._stream.readline().decode().split(" ", 2)
        assert protocol == "HTTP/1.1"
        headers = http.client.parse_headers(self._stream)
        return int(status), json.loads(self._stream.read(int(headers["content-length"])))

    def read_rest(self) -> bytes:
        """Everything that still comes when no more is sent."""
        self._connection.shutdown(socket.SHUT_WR)
        return self._stream.read()


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    """A connection; afterwards nothing is in flight."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection,
        connection.makefile("rb") as stream,
    ):
        yield Wire(connection, stream)
    server.wait_idle()


@pytest.fixture(params=OFFERS)
def offer(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The header lines of an offer to go on in another protocol."""
    return OFFERS[request.param]


@pytest.fixture(params=[0, PAUSE_S], ids=["together", "apart"])
def pause_s(request: pytest.FixtureRequest) -> float:
    """Between the head of a request and its body."""
    pause_s: float = request.param
    return pause_s


def test_a_body_that_looks_like_a_request_is_not_answered(wire: Wire, offer: tuple[str, ...], pause_s: float) -> None:
    """There is exactly one answer: what was sent is not an image."""
    assert len(LOOKS_LIKE_A_REQUEST) == 36
    wire.send(LOOKS_LIKE_A_REQUEST, *offer, pause_s=pause_s)

    status, problem = wire.read_answer()
    assert (status, problem["code"]) == (415, "unsupported_image")
    assert wire.read_rest() == b""


def test_the_next_request_on_the_connection_is_answered(
    wire: Wire, reference: Reference, offer: tuple[str, ...], pause_s: float
) -> None:
    """The server has not lost its place."""
    wire.send(LOOKS_LIKE_A_REQUEST, *offer, pause_s=pause_s)
    assert wire.read_answer()[0] == 415

    wire.send(JPEG)
    status, body = wire.read_answer()
    assert status == 200, body
    assert reference(JPEG) == labels_in(body)
    assert wire.read_rest() == b""


def test_an_image_is_classified_all_the_same(wire: Wire, reference: Reference, offer: tuple[str, ...], pause_s: float) -> None:
    """Its body is read as that of any other request, twice on one connection."""
    for _ in range(2):
        wire.send(JPEG, *offer, pause_s=pause_s)
        status, body = wire.read_answer()
        assert status == 200, body
        assert reference(JPEG) == labels_in(body)
    assert wire.read_rest() == b""
