"""What stands around every request: its id, the access log, HEAD, and the end of connections in a drain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.http.application import drain
from app.http.middleware import RequestContextMiddleware
from app.log import request_id
from tests.app.http.conftest import LogLines
from tests.app.http.served import (
    CLASSIFY,
    JPEG,
    MODEL,
    Gate,
    Served,
    check_answer,
    check_problem,
    in_background,
    make_settings,
    running,
)

pytestmark = pytest.mark.anyio

OURS = re.compile(r"[0-9a-f]{32}")
HOSTILE_IDS = [
    b"",
    b"two words",
    b"line\nbreak",
    b"line\r\nx-evil: 1",
    b"x" * 129,
    b"x" * 10_240,
    "ä".encode(),
    "ä".encode("latin-1"),
    b"\0",
    b"<script>",
    b'"quoted"',
]


@pytest.mark.parametrize("identifier", ["a", "01JABC", "0af7651916cd43dd-b7ad.6b:7_1", "x" * 128])
async def test_an_id_is_taken_over(served: Served, identifier: str) -> None:
    """From the header to the answer's header and body, good or bad."""
    headers = {"X-Request-ID": identifier}
    assert identifier == check_answer(await served.classify(JPEG, headers=headers)).request_id
    assert identifier == check_problem(await served.classify(b"", headers=headers), 422, "invalid_image").request_id


async def test_an_id_is_made_where_none_came(served: Served) -> None:
    """Another for each request, on every route."""
    paths = ["/", "/health/live", "/metrics", "/static/page.js", "/nothing", "/nothing"]
    found = [(await served.client.get(path)).headers["x-request-id"] for path in paths]
    assert all(OURS.fullmatch(identifier) for identifier in found)
    assert len(paths) == len(set(found))


@pytest.mark.parametrize("identifier", HOSTILE_IDS, ids=lambda identifier: repr(identifier[:20]))
async def test_a_hostile_id_is_replaced(served: Served, identifier: bytes, log_lines: LogLines) -> None:
    """Nothing of it comes back in a header, in the body, or in the log."""
    response = await served.classify(b"", headers=[(b"x-request-id", identifier)])
    assert OURS.fullmatch(check_problem(response, 422, "invalid_image").request_id or "")
    assert "x-evil" not in response.headers
    assert len(response.headers.get_list("x-request-id")) == 1
    ours = response.headers["x-request-id"]
    assert {ours} >= {line["request_id"] for line in log_lines() if "request_id" in line}


async def test_the_first_acceptable_of_several_ids_is_taken(served: Served) -> None:
    """A proxy may add one to a client's bad one."""
    headers = [(b"x-request-id", b"not good"), (b"x-request-id", b"good"), (b"x-request-id", b"late")]
    assert (await served.client.get("/", headers=headers)).headers["x-request-id"] == "good"


async def test_requests_at_the_same_time_keep_their_ids(tiny_repository: Path, gate: Gate) -> None:
    """Each answer carries its own, though they were computed in one batch."""
    async with running(make_settings(tiny_repository)) as served:
        with gate.held():
            requests = [served.classify(JPEG, headers={"x-request-id": f"id-{number}"}) for number in range(6)]
            async with in_background(*requests) as tasks:
                await gate.began(1)
                gate.release()
                found = [check_answer(await task).request_id for task in tasks]
    assert [f"id-{number}" for number in range(6)] == found


UNLISTED = ["/", "/docs", "/openapi.json", "/healthz", "/livez", "/readyz", "/static/page.js", "/static/swagger/swagger-ui.css"]


def get_paths(served: Served) -> list[str]:
    """Every address that answers GET."""
    listed = [path for path, methods in served.app.openapi()["paths"].items() if "get" in methods]
    assert {"/metrics", "/v1/models", "/v1/models/{name}/versions/{version}"} <= {*listed}
    return [*UNLISTED, *(path.replace("{name}", MODEL).replace("{version}", "1") for path in listed)]


async def test_head_is_get_without_the_body(served: Served) -> None:
    """On every address, as RFC 9110 asks of every server; health checks use it."""
    for path in get_paths(served):
        got, head = await served.client.get(path), await served.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert got.headers["content-type"] == head.headers["content-type"]
        assert head.headers.get("content-length", "0") != "0"


async def test_a_slash_at_the_end_makes_no_difference(served: Served) -> None:
    """And is no reason for a redirect to a host, which would name http:// where a proxy speaks https."""
    for path in get_paths(served):
        got = await served.client.get(path)
        with_slash = await served.client.get(path.rstrip("/") + "/", follow_redirects=path == "/docs")
        assert (with_slash.status_code, with_slash.headers["content-type"]) == (200, got.headers["content-type"]), path
    check_answer(await served.client.post(CLASSIFY + "/", content=JPEG))
    for path in ("/nothing/", "/static/", "/v1/", "//", "/v1/models//"):
        assert (await served.client.get(path)).status_code in (200, 404), path


async def test_only_our_failures_are_logged_unless_access_is_asked_for(tiny_repository: Path, log_lines: LogLines) -> None:
    """Every request with `log.access`, else those from 500 on but for 503; with method, path, status and time."""

    def logged() -> list[dict[str, Any]]:
        return [line for line in log_lines() if line["event"] == "request"]

    async with running(make_settings(tiny_repository)) as served:
        await served.classify(JPEG)
        await served.classify(b"")
        served.service.admission.close()
        assert (await served.classify(JPEG)).status_code == 503  # counted, not logged: it comes when there is most to do
        assert served.outcome("overloaded", model="unknown") == 1
        assert logged() == []
    async with running(make_settings(tiny_repository, log={"access": True})) as served:
        await served.classify(JPEG, headers={"x-request-id": "good"})
        await served.client.head("/nothing", headers={"x-request-id": "bad"})
    good, bad = logged()
    assert tuple(good[key] for key in ("level", "request_id", "method", "path", "status")) == (
        "info",
        "good",
        "POST",
        CLASSIFY,
        200,
    )
    assert tuple(bad[key] for key in ("level", "request_id", "method", "path", "status")) == (
        "info",
        "bad",
        "HEAD",
        "/nothing",
        404,
    )
    assert good["ms"] > 0


async def test_answers_close_their_connections_while_the_service_drains(served: Served) -> None:
    """So that a client finds another instance before this one is gone; the work is done all the same."""
    assert "connection" not in (await served.classify(JPEG)).headers
    drain(served.app)
    response = await served.classify(JPEG)
    check_answer(response)
    assert response.headers["connection"] == "close"
    for path in ("/health/live", "/health/ready", "/nothing"):
        assert (await served.client.get(path)).headers["connection"] == "close"


async def test_after_the_answer_has_begun_an_error_goes_to_the_server(log_lines: LogLines) -> None:
    """It can only close the connection; a second answer would be taken for a part of the first."""

    class App:
        class state:  # noqa: N801 - as Starlette has it
            draining = False

    async def broken(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise RuntimeError("too late")

    async def receive() -> Message:
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    middleware = RequestContextMiddleware(broken, max_head_bytes=1000, access_log=False)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(b"x-request-id", b"mine")],
        "app": App,
    }
    with pytest.raises(RuntimeError, match="too late"):
        await middleware(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert {"mine"} == {line["request_id"] for line in log_lines()}
    assert request_id.get() is None
