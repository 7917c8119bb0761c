"""GET /metrics, read as Prometheus reads it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from urllib.parse import quote

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import OUTCOMES, PHASES, REASONS
from tests.app.http.served import BAD_REQUESTS, CLASSIFY, JPEG, MODEL, PNG, Served, as_files, check_answer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]

ALLOWED_LABELS = {
    "model": {MODEL, "unknown"},
    "outcome": set(OUTCOMES),
    "phase": set(PHASES),
    "stage": {"0", "1", "2"},
    "part": {"fixed", "per_image"},
    "quality": {"full", "balanced", "fast"},
    "version": {"1"},
    "variant": {"fp32"},
    "target": {"cpu", "cpu_vnni"},
    "reason": set(REASONS),
}


async def after_all_kinds_of_requests(served: Served) -> None:
    """Good ones, bad ones, and ones with words that must not become labels."""
    check_answer(await served.classify(JPEG))
    check_answer(await served.client.post(CLASSIFY, files=as_files([JPEG, PNG, b"text"])), num_results=3)
    for bad in BAD_REQUESTS:
        assert bad.status == (await served.client.post(CLASSIFY, **bad.request)).status_code
    for name in ("evil", 'quo"te', "new\nline", "ünicode", "x" * 1000):
        assert (await served.classify(JPEG, params={"model": name}, headers={"x-request-id": "evil-id"})).status_code == 404
        await served.client.get(f"/v1/models/{quote(name)}")


async def test_both_formats_can_be_parsed(served: Served) -> None:
    """Prometheus' text by default, OpenMetrics where it is asked for; the same numbers."""
    await after_all_kinds_of_requests(served)
    text = await served.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    wanted = "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"
    modern = await served.client.get("/metrics", headers={"accept": wanted})
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    counts = []
    for families in (
        list(text_string_to_metric_families(text.text)),
        list(openmetrics_parser.text_string_to_metric_families(modern.text)),
    ):
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            if family.name.startswith("fovea")
            for sample in family.samples
        }
        counts.append({key: value for key, value in samples.items() if not key[0].endswith("_created")})
    assert counts[0] == counts[1]
    assert counts[0]["fovea_requests_total", (("model", MODEL), ("outcome", "ok"))] == 2


async def test_labels_never_hold_what_a_client_said(served: Served) -> None:
    """Anybody could fill the memory of the service, and of Prometheus."""
    await after_all_kinds_of_requests(served)
    families = text_string_to_metric_families((await served.client.get("/metrics")).text)
    seen: dict[str, set[str]] = {}
    for family in families:
        if not family.name.startswith("fovea"):
            continue
        for sample in family.samples:
            for label, value in sample.labels.items():
                seen.setdefault(label, set()).add(value)
    assert seen.pop("le")
    assert set(ALLOWED_LABELS) == set(seen)
    for label, values in seen.items():
        assert values <= ALLOWED_LABELS[label]


@pytest.mark.parametrize("query", [{"top_k": "abc"}, {"topk": "3"}, {"version": "0"}])
async def test_a_request_with_a_bad_query_is_counted(served: Served, query: dict[str, str]) -> None:
    """As every other that is refused."""
    assert (await served.classify(JPEG, params=query)).status_code == 422
    assert served.outcome("client_error", model="unknown") == 1
    assert served.sample("fovea_request_duration_seconds_count", model="unknown") == 1


async def test_requests_images_and_executions_are_counted_apart(served: Served) -> None:
    """A request of three images, one of them bad: one request, three images, and as many exits as answers."""
    await served.client.post(CLASSIFY, files=as_files([JPEG, b"text", PNG]))
    assert served.outcome("ok") == 1
    assert served.sample("fovea_images_total", model=MODEL, outcome="ok") == 2
    assert served.sample("fovea_images_total", model=MODEL, outcome="client_error") == 1
    assert sum(served.sample("fovea_exits_total", model=MODEL, stage=stage) for stage in "012") == 2
    assert served.sample("fovea_batch_size_sum", model=MODEL, stage="0") == 2
    for phase in PHASES:
        assert served.sample("fovea_phase_duration_seconds_count", model=MODEL, phase=phase) == 2
    assert served.sample("fovea_request_duration_seconds_count", model=MODEL) == 1
    served.assert_nothing_in_flight()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_has_nothing_to_say(served: Served) -> None:
    """Names, units and help texts as Prometheus wants them."""
    await after_all_kinds_of_requests(served)
    text = (await served.client.get("/metrics")).content
    command = ["promtool", "check", "metrics"]
    done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
