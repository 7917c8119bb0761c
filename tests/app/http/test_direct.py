"""The short way answers as the long one does."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope

from app.errors import Overloaded
from app.http.direct import Direct
from tests.app.http.served import CLASSIFY, JPEG, Served, check_problem

pytestmark = pytest.mark.anyio


async def answer(scope: Scope, _receive: Receive) -> Response:
    """What the short way says."""
    if scope["query_string"]:
        raise Overloaded("too much", retry_after_s=2.5)
    return PlainTextResponse("short")


@pytest.fixture
def client() -> httpx.AsyncClient:
    """Nothing but the short way."""
    direct = Direct({("POST", "/x"): answer})
    return httpx.AsyncClient(transport=httpx.ASGITransport(direct), base_url="http://test")


async def test_a_handler_answers(client: httpx.AsyncClient) -> None:
    """For its method and path."""
    assert (await client.post("/x")).text == "short"


async def test_errors_of_the_service_become_problems(client: httpx.AsyncClient) -> None:
    """With the header that belongs to them."""
    response = await client.post("/x?a=1")
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["code"] == "overloaded"


async def test_under_a_prefix_the_application_answers_likewise(served: Served) -> None:
    """`root_path` makes the path another one; what comes back is the same."""
    transport = httpx.ASGITransport(served.app, root_path="/prefix")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        long = await client.post("/prefix" + CLASSIFY, content=JPEG)
        bad = await client.post("/prefix" + CLASSIFY, content=b"text")
    short = await served.classify(JPEG)

    assert [r["predictions"] for r in long.json()["results"]] == [r["predictions"] for r in short.json()["results"]]
    check_problem(bad, 415, "unsupported_image")


async def test_only_the_very_method_and_path_go_the_short_way(served: Served) -> None:
    """Another method on the path is answered by the framework, and both carry the request's id."""
    short, long = await served.classify(JPEG), await served.client.get(CLASSIFY)
    assert (short.status_code, long.status_code) == (200, 405)
    assert all(len(response.headers.get_list("x-request-id")) == 1 for response in (short, long))
