"""Live and ready: for who restarts the process, and for who sends it requests."""

from __future__ import annotations

import asyncio

import pytest

from app.http.application import drain
from tests.app.http.served import JPEG, MODEL, Served, check_answer, check_problem, until

pytestmark = pytest.mark.anyio


async def test_a_service_that_stands_is_live_and_ready(served: Served) -> None:
    """And the metric says the same."""
    live, ready = await served.client.get("/health/live"), await served.client.get("/health/ready")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert (ready.status_code, ready.json()) == (200, {"ready": True})
    assert served.sample("fovea_ready") == 1


async def test_a_service_that_drains_is_live_but_not_ready(served: Served) -> None:
    """Who still sends a request is answered."""
    drain(served.app)
    live, ready = await served.client.get("/health/live"), await served.client.get("/health/ready")
    assert live.status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"ready": False})
    assert served.sample("fovea_ready") == 0
    check_answer(await served.classify(JPEG))


async def test_a_service_whose_model_failed_is_live_but_not_ready(served: Served) -> None:
    """A batch loop that died cannot come back: requests fail in words, /v1/models and the metric say it too."""
    (loop,) = [task for task in asyncio.all_tasks() if task.get_name() == f"{MODEL} stage 1"]
    loop.cancel()
    await until(loop.done)
    live, ready = await served.client.get("/health/live"), await served.client.get("/health/ready")
    assert live.status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"ready": False})
    assert served.sample("fovea_ready") == 0
    check_problem(await served.classify(JPEG), 500, "inference_failed", "model")
    (model,) = (await served.client.get("/v1/models")).json()["models"]
    assert not model["ready"]
    served.assert_nothing_in_flight()
