"""SIGTERM: not ready, answer everything that was accepted, exit with 0."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.http_client import Outcome
from tests.bench.load import closed_loop
from tests.e2e.servers import Server, distinct_images
from tests.fakes import PATIENCE_S

CLIENTS = 16


def wait_until(condition: Callable[[], object]) -> None:
    """Ask again and again; fails when it takes too long."""
    ends_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends_at, "waited in vain"
        time.sleep(0.01)


def is_ready(server: Server) -> bool:
    return server.get("/health/ready")[0] == 200


@pytest.mark.anyio
async def test_under_load_every_accepted_request_is_answered(tiny_repository: Path, tmp_path: Path) -> None:
    """16 keep-alive clients that go on until nobody accepts their connections: none is reset, none waits in vain."""
    with Server(tiny_repository, tmp_path / "log") as server:
        images = distinct_images(32)
        load = asyncio.ensure_future(
            closed_loop(
                server.classify_url,
                images,
                connections=CLIENTS,
                seconds=3 * PATIENCE_S,
                stop_when_refused=True,
                timeout_s=PATIENCE_S,
            )
        )
        await asyncio.to_thread(wait_until, lambda: sum(server.samples("fovea_requests_total").values()) >= 100)
        assert await asyncio.to_thread(is_ready, server)
        server.terminate()
        await asyncio.to_thread(wait_until, lambda: not is_ready(server))
        assert (await asyncio.to_thread(server.get, "/health/live"))[0] == 200  # whoever restarts it must not do so now
        loaded = await load
        assert await asyncio.to_thread(server.wait) == 0
    ended_well = {Outcome.OK, Outcome.REFUSED}
    assert {outcome for outcome, count in loaded.counts.items() if count} == ended_well, loaded.counts
    assert loaded.counts[Outcome.OK] > 100
    assert loaded.counts[Outcome.REFUSED] == CLIENTS
    assert "Traceback" not in server.written()


def half_of_a_request(server: Server) -> tuple[socket.socket, bytes]:
    """A connection that has sent the head and half of the body, and what is still to be sent."""
    (image,) = distinct_images(1)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    head = f"POST /v1/classify HTTP/1.1\r\nHost: fovea\r\nContent-Length: {len(image)}\r\n\r\n"
    connection.sendall(head.encode() + image[:100])
    return connection, image[100:]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_upload_under_way_is_read_to_its_end_and_answered(
    tiny_repository: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    """Also when its second half comes after the drain, when nobody new is accepted any more; Ctrl-C is the same."""
    with Server(tiny_repository, tmp_path / "log", HTTP__DRAIN_DELAY_S=0.2) as server:
        connection, rest = half_of_a_request(server)
        with connection:
            wait_until(lambda: any(server.samples("fovea_in_flight_bytes").values()))
            server.process.send_signal(stop)
            wait_until(lambda: not accepts(server))
            connection.sendall(rest)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert (response.status, response.headers["connection"]) == (200, "close")
            assert json.loads(response.read())["results"][0]["predictions"]
        assert server.wait() == 0
    assert "Traceback" not in server.written()


def accepts(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S).close()
    except ConnectionRefusedError:
        return False
    return True


def test_connections_that_say_nothing_do_not_keep_it(tiny_repository: Path, tmp_path: Path) -> None:
    """One that never asked anything, one whose last answer is long past, one in the middle of its head."""
    with Server(tiny_repository, tmp_path / "log", HTTP__DRAIN_DELAY_S=0) as server:
        silent, past, started = (socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) for _ in range(3))
        with silent, past, started:
            past.sendall(b"GET /health/live HTTP/1.1\r\nHost: fovea\r\n\r\n")
            assert past.recv(12) == b"HTTP/1.1 200"
            started.sendall(b"POST /v1/classify HT")
            server.stop()
            assert silent.recv(1) == b""


def test_a_second_signal_ends_the_drain(tiny_repository: Path, tmp_path: Path) -> None:
    """Whoever presses Ctrl-C twice does not want to wait for a minute."""
    with Server(tiny_repository, tmp_path / "log", HTTP__DRAIN_DELAY_S=3600) as server:
        server.terminate()
        wait_until(lambda: not is_ready(server))
        server.stop()


def test_a_request_that_never_ends_is_ended(tiny_repository: Path, tmp_path: Path) -> None:
    """After `shutdown_timeout_s` its connection is closed; the exit is clean all the same."""
    settings = {"HTTP__DRAIN_DELAY_S": 0, "HTTP__SHUTDOWN_TIMEOUT_S": 1}
    with Server(tiny_repository, tmp_path / "log", **settings) as server:
        connection, _ = half_of_a_request(server)
        with connection:
            wait_until(lambda: any(server.samples("fovea_in_flight_bytes").values()))
            server.stop()
