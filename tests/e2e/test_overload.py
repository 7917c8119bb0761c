"""More than the service can take: at once an answer or a refusal for everybody, and everything comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from tests.app.http.served import CLASSIFY, as_files, check_answer, check_problem
from tests.bench.http_client import Outcome
from tests.bench.load import closed_loop, open_loop
from tests.e2e.servers import Server, distinct_images
from tests.fakes import PATIENCE_S

pytestmark = pytest.mark.anyio

ROOM = {
    "LIMITS__MAX_IN_FLIGHT": 4,
    "BATCHING__MAX_BATCH_SIZE": 4,
    "RUNTIME__INSTANCES": 1,
    "HTTP__MAX_IMAGES_PER_REQUEST": 4,
}


@pytest.fixture(scope="module")
def server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With room for 4 images; one for all tests here, so each also shows that it recovered from the one before."""
    with Server(tiny_repository, tmp_path_factory.mktemp("overload") / "log", **ROOM) as server:
        yield server
        server.stop()
        assert "Traceback" not in server.written()


def outcomes(server: Server) -> Counter[str]:
    """Requests so far, by outcome."""
    return Counter({dict(labels)["outcome"]: int(value) for labels, value in server.samples("fovea_requests_total").items()})


async def test_far_too_many_clients_are_answered_or_refused_at_once(server: Server) -> None:
    """48 clients: every request ends in 200 or 503, none is reset, and the metrics count the same."""
    images = distinct_images(32)
    before = outcomes(server)
    loaded = await closed_loop(server.classify_url, images, connections=48, num_requests=1500, keep_bodies=True)
    counts = loaded.counts
    assert counts[Outcome.OK] + counts[Outcome.OVERLOADED] == loaded.num_requests == 1500
    assert min(counts[Outcome.OK], counts[Outcome.OVERLOADED]) > 0
    codes = Counter(orjson.loads(answer.body).get("code") for answer in loaded.answers)
    assert codes == {None: counts[Outcome.OK], "overloaded": counts[Outcome.OVERLOADED]}
    server.wait_idle()
    assert outcomes(server) - before == {"ok": counts[Outcome.OK], "overloaded": counts[Outcome.OVERLOADED]}
    assert server.get("/health/ready")[0] == 200
    alone = await closed_loop(server.classify_url, images, connections=1, num_requests=20)
    assert alone.counts[Outcome.OK] == 20


async def test_more_arrivals_than_can_be_computed_do_not_pile_up(server: Server) -> None:
    """Arrivals on their own schedule, far beyond what one instance can do: refused, not queued for ever."""
    loaded = await open_loop(server.classify_url, distinct_images(16), rate=1500, seconds=1, seed=1, timeout_s=PATIENCE_S)
    ended = {outcome for outcome, count in loaded.counts.items() if count}
    assert ended <= {Outcome.OK, Outcome.OVERLOADED}, loaded.counts
    assert Outcome.OK in ended
    server.wait_idle()
    assert not any(server.samples("fovea_queue_size").values())


async def test_several_images_are_admitted_together_or_refused_together(server: Server) -> None:
    """Never half of a request; a refusal says when to come back."""
    images = distinct_images(4)
    before = outcomes(server)
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE_S, limits=limits) as client:

        async def send(count: int) -> int:
            response = await client.post(CLASSIFY, files=as_files(images[:count]))
            if response.status_code == 200:
                check_answer(response, num_results=count)
            else:
                check_problem(response, 503, "overloaded", "at most 4")
                assert 1 <= int(response.headers["retry-after"]) <= 60
            return response.status_code

        statuses = await asyncio.gather(*(send(1 + number % 4) for number in range(120)))
        server.wait_idle()
        assert await send(4) == 200
    assert (outcomes(server) - before)["ok"] == statuses.count(200) + 1
