"""Live and ready: for who restarts the process, and for who sends it requests."""

from __future__ import annotations

import pytest

from app.http.application import drain
from app.runtime.health import MAX_GIVEN_UP
from tests.app.http.served import JPEG, Served, check_answer

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


async def test_a_service_whose_model_failed_is_live_but_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many runs never ended: /v1/models and the metric say it too; whoever still comes is answered."""
    monkeypatch.setattr(served.app.state.service.registry.get().pool._health, "_num_given_up", MAX_GIVEN_UP)
    live, ready = await served.client.get("/health/live"), await served.client.get("/health/ready")
    assert live.status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"ready": False})
    assert served.sample("fovea_ready") == 0
    check_answer(await served.classify(JPEG))
    (model,) = (await served.client.get("/v1/models")).json()["models"]
    assert not model["ready"]
    served.assert_nothing_in_flight()


@pytest.mark.parametrize(("name", "path"), [("/healthz", "live"), ("/livez", "live"), ("/readyz", "ready")])
async def test_the_names_that_kubernetes_uses_mean_the_same(served: Served, name: str, path: str) -> None:
    """Also in a drain."""
    for _ in range(2):
        ours, theirs = await served.client.get(f"/health/{path}"), await served.client.get(name)
        assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())
        drain(served.app)
