"""The real process on a real socket: what only HTTP on the wire can show."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.http.schemas import ClassifyResponse
from tests.app.http.served import BAD_REQUESTS, CLASSIFY, check_answer, check_problem, labels_of
from tests.bench.http_client import Outcome
from tests.bench.load import closed_loop
from tests.e2e.servers import MODEL, Server, distinct_images
from tests.fakes import PATIENCE_S
from tests.images import make_jpeg, photo

JPEG = make_jpeg(photo(seed=5))
MAX_UPLOAD_BYTES = 2**20
HEAD = f"POST {CLASSIFY} HTTP/1.1\r\nHost: fovea\r\n"


@pytest.fixture(scope="module")
def server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests here, so each also shows that what the others did left no damage."""
    log = tmp_path_factory.mktemp("served") / "log"
    settings = {"HTTP__MAX_UPLOAD_BYTES": MAX_UPLOAD_BYTES, "HTTP__HEAD_TIMEOUT_S": 2, "LOG__ACCESS": True}
    with Server(tiny_repository, log, **settings) as server:
        yield server
        server.wait_idle()
        server.stop()


@pytest.fixture
def connection(server: Server) -> Iterator[socket.socket]:
    """A connection; afterwards nothing is in flight."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        yield connection
    server.wait_idle()


def read_answer(connection: socket.socket, method: str = "POST") -> http.client.HTTPResponse:
    """The next answer on the connection, with its body still to be read."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response


def post(body: bytes, *headers: str) -> bytes:
    return (HEAD + "".join(f"{line}\r\n" for line in (f"Content-Length: {len(body)}", *headers)) + "\r\n").encode() + body


def assert_answers(connection: socket.socket) -> None:
    """The connection is good for another request."""
    connection.sendall(post(JPEG))
    response = read_answer(connection)
    assert response.status == 200
    ClassifyResponse.model_validate_json(response.read())


def problem_code(response: http.client.HTTPResponse) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    code: str = json.loads(response.read())["code"]
    return code


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=str)
def test_a_bad_request_leaves_its_connection_usable(server: Server, bad: object) -> None:
    """The same refusals as in process, over one connection with good requests before and after."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE_S) as client:
        expected = labels_of(check_answer(client.post(CLASSIFY, content=JPEG)))
        check_problem(client.post(CLASSIFY, **bad.request), bad.status, bad.code, *bad.words)
        assert expected == labels_of(check_answer(client.post(CLASSIFY, content=JPEG)))


def test_a_body_announced_as_too_large_is_refused_before_it_is_sent(connection: socket.socket) -> None:
    """Ten gigabytes are announced, and not one byte is waited for."""
    connection.sendall(f"{HEAD}Content-Length: {10 * 2**30}\r\n\r\n".encode())
    response = read_answer(connection)
    assert (response.status, problem_code(response)) == (413, "payload_too_large")


def test_a_client_that_asks_first_is_told_not_to_send(connection: socket.socket) -> None:
    """curl does, with `Expect: 100-continue`, for what is not small."""
    connection.sendall(f"{HEAD}Expect: 100-continue\r\nContent-Length: {MAX_UPLOAD_BYTES + 1}\r\n\r\n".encode())
    assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_client_that_asks_first_is_told_to_go_on(connection: socket.socket) -> None:
    """And then gets its answer."""
    connection.sendall(f"{HEAD}Expect: 100-continue\r\nContent-Length: {len(JPEG)}\r\n\r\n".encode())
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(JPEG)
    assert read_answer(connection).status == 200


def test_an_endless_body_without_length_is_refused_while_it_comes(connection: socket.socket) -> None:
    """As soon as it is over the limit; its end is never sent."""
    chunk = b"10000\r\n" + b"\xff" * 0x10000 + b"\r\n"
    connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(MAX_UPLOAD_BYTES // 0x10000 + 1):
        connection.sendall(chunk)
    response = read_answer(connection)
    assert (response.status, problem_code(response)) == (413, "payload_too_large")


def test_after_a_body_that_was_too_large_the_connection_is_closed(connection: socket.socket) -> None:
    """The rest that was sent all the same is not taken for the next request, and the answer is not lost in a reset."""
    connection.sendall(post(b"POST / HTTP/1.1\r\n\r\n" * (MAX_UPLOAD_BYTES // 19 + 1)))
    response = read_answer(connection)
    assert (response.status, problem_code(response)) == (413, "payload_too_large")
    assert response.headers["connection"] == "close"
    assert connection.recv(1) == b""


def test_chunks_are_put_together(connection: socket.socket) -> None:
    """However small."""
    connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    for start in range(0, len(JPEG), 100):
        piece = JPEG[start : start + 100]
        connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    connection.sendall(b"0\r\n\r\n")
    response = read_answer(connection)
    assert response.status == 200
    response.read()
    assert_answers(connection)


@pytest.mark.parametrize("path", ["/", "/health/ready", "/metrics", CLASSIFY, "/nothing"])
def test_head_has_no_body_on_the_wire(connection: socket.socket, path: str) -> None:
    """Whatever the status: a body would be taken for the next answer."""
    connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: fovea\r\n\r\n".encode())
    response = read_answer(connection, "HEAD")
    assert response.status == {CLASSIFY: 405, "/nothing": 404}.get(path, 200)
    assert response.read() == b""
    assert_answers(connection)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        HEAD.encode() + b"Content-Length: -1\r\n\r\n",
        HEAD.encode() + b"Content-Length: many\r\n\r\n",
        HEAD.encode() + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        HEAD.encode() + b"X-Request-ID: a\x00b\r\nContent-Length: 0\r\n\r\n",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n",
    ],
    ids=lambda garbage: repr(garbage[-30:]),
)
def test_what_is_not_http_is_refused_and_harms_nobody(server: Server, garbage: bytes) -> None:
    """TLS on the plain port, a length that is none: 400 and the connection ends, or it is just ended."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    server.wait_idle()
    assert server.get("/health/ready")[0] == 200


def test_clients_that_leave_cost_nothing(server: Server) -> None:
    """In the middle of their upload, or without waiting for the answer: nothing stays in flight, the next is answered."""
    request = post(JPEG)
    for cut in (10, len(request) - len(JPEG), len(request) - 1, len(request)):
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
                connection.sendall(request[:cut])
    server.wait_idle()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        assert_answers(connection)


@pytest.mark.anyio
async def test_bad_requests_cost_the_good_ones_nothing(server: Server) -> None:
    """Eight clients send good images while as many send every kind of bad request: each gets what it should."""
    images = distinct_images(16)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE_S) as client:

        async def send_bad() -> None:
            for bad in BAD_REQUESTS:
                check_problem(await client.post(CLASSIFY, **bad.request), bad.status, bad.code, *bad.words)

        good = asyncio.ensure_future(closed_loop(server.classify_url, images, connections=8, num_requests=400))
        await asyncio.gather(*(send_bad() for _ in range(8)))
        loaded = await good
    assert loaded.counts[Outcome.OK] == 400
    server.wait_idle()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("arguments", "num_results"),
    [
        (["--data-binary", "@photo.jpg", "-H", "Content-Type: image/jpeg"], 1),
        (["--data-binary", "@photo.jpg"], 1),
        (["-T", "photo.jpg", "-X", "POST"], 1),
        (["-F", "images=@photo.jpg"], 1),
        (["-F", "images=@photo.jpg", "-F", "images=@photo.jpg", "-F", "top_k=2"], 2),
    ],
)
def test_curl_gets_its_answer(server: Server, tmp_path: Path, arguments: list[str], num_results: int) -> None:
    """As `make serve` and the README say it, and the other ways people send files."""
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    command = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", *arguments, server.classify_url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=PATIENCE_S)
    answer = ClassifyResponse.model_validate_json(done.stdout)
    assert (answer.model, len(answer.results)) == (MODEL, num_results)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say_of_the_live_exposition(server: Server) -> None:
    """With the process's own metrics in it."""
    _, text = server.get("/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert b"process_resident_memory_bytes" in text


def test_every_line_of_the_log_is_json_with_the_id_of_its_request(server: Server, connection: socket.socket) -> None:
    """So that a machine can read it; only the greeting at the start is for people."""
    connection.sendall(post(JPEG, "X-Request-ID: find-me"))
    assert read_answer(connection).headers["x-request-id"] == "find-me"
    server.get("/health/live")  # a line is written after its answer was sent, but before the next one
    lines = [line for line in server.written().splitlines() if line and not line.startswith(("Fovea is ready", "curl "))]
    parsed = [json.loads(line) for line in lines]
    (mine,) = [line for line in parsed if line.get("request_id") == "find-me"]
    assert (mine["event"], mine["path"], mine["status"]) == ("request", CLASSIFY, 200)
    assert not [line for line in parsed if line["level"] == "error"]


def test_a_small_body_that_nobody_wants_leaves_the_connection_as_it_is(connection: socket.socket) -> None:
    """It is dropped as it comes, and the next request on the connection is answered."""
    for _ in range(20):
        connection.sendall(post(JPEG).replace(CLASSIFY.encode(), CLASSIFY.encode() + b"?model=nobody", 1))
        response = read_answer(connection)
        assert (response.status, problem_code(response)) == (404, "model_not_found")
        assert response.headers["connection"] is None
        response.read()
    assert_answers(connection)


def test_a_connection_whose_body_nobody_wants_is_ended_when_nothing_more_comes(connection: socket.socket) -> None:
    """As any other that idles, though its body came after the answer, and only in part."""
    request = post(JPEG).replace(CLASSIFY.encode(), CLASSIFY.encode() + b"?model=nobody", 1)
    head = len(request) - len(JPEG)
    connection.sendall(request[:head])
    response = read_answer(connection)
    assert (response.status, problem_code(response)) == (404, "model_not_found")
    connection.sendall(request[head:-1])
    assert connection.recv(1) == b""
