"""Time budgets: said in four ways, kept, and refused at once where they cannot be; and quality bent before that."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from app.loaded_model import LoadedModel
from app.scheduling.forecast import Forecast
from app.settings import Settings
from tests.app.http.served import (
    JPEG,
    MODEL,
    MULTIPART,
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
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("both_ways")]

WAYS: dict[str, dict[str, Any]] = {
    "query": {"content": JPEG, "params": {"timeout_ms": 50}},
    "header": {"content": JPEG, "headers": {"X-Request-Timeout-Ms": "50"}},
    "json": {"json": {"images": [base64_of(JPEG)], "timeout_ms": 50}},
    "multipart": {
        "content": multipart(part(JPEG), part(b"50", "timeout_ms", None)),
        "headers": {"content-type": MULTIPART},
    },
}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate().installed(monkeypatch)


def expecting(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float) -> LoadedModel:
    """The model, which thinks that an answer takes so long."""
    model = served.service.registry.get()
    monkeypatch.setattr(model.forecast, "predict_s", lambda *_: seconds)
    monkeypatch.setattr(model.forecast, "needed_s", lambda predicted_s: predicted_s)  # whatever this machine is busy with
    return model


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_says_how_long_it_may_take(
    tiny_repository: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """And is told when that is over; its image is not computed any more."""
    async with running(make_settings(tiny_repository)) as served:
        expecting(served, monkeypatch, 0.0)  # so that it is taken in
        began = len(gate.batches)
        with gate.held():
            # Whoever is on the instance keeps it; the one behind runs out of time.
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(began + 1)
                response = await served.client.post("/v1/classify", **WAYS[way])
                check_problem(response, 504, "deadline_exceeded", "time budget of 0.05 s")
                gate.release()
                check_answer(await first)
        assert served.outcome("timeout") == 1
        assert sum(size for stage, size in gate.batches[began:] if stage == 0) == 1
        served.assert_nothing_in_flight()


async def test_the_budget_of_a_model_is_that_of_a_request_that_names_none(tiny_repository: Path, gate: Gate) -> None:
    """And its largest one is the largest that may be asked for."""
    deadlines = {"default_ms": 60_000, "models": {MODEL: {"default_ms": 50, "max_ms": 200}}}
    async with running(make_settings(tiny_repository, deadlines=deadlines, http={"request_timeout_s": 60})) as served:
        with gate.held():
            check_problem(await served.classify(JPEG), 504, "deadline_exceeded", "0.05 s")
        too_long = await served.classify(JPEG, params={"timeout_ms": 201})
        check_problem(too_long, 422, "invalid_request", "timeout_ms is 201", "at most 200")
        check_answer(await served.classify(JPEG, params={"timeout_ms": 200}))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"params": {"timeout_ms": 0}}, ("timeout_ms", "greater than or equal to 1")),
        ({"headers": {"X-Request-Timeout-Ms": "soon"}}, ("'soon'", "whole number of milliseconds")),
        ({"headers": {"X-Request-Timeout-Ms": "5"}, "params": {"timeout_ms": 6}}, ("6 in the query", "5 in the header")),
    ],
)
async def test_a_budget_that_cannot_be_read_is_refused(
    served: Served, request_: dict[str, Any], words: tuple[str, ...]
) -> None:
    """With a sentence."""
    check_problem(await served.classify(JPEG, **request_), 422, "invalid_request", *words)


def test_a_default_above_the_largest_is_refused_at_start(tiny_repository: Path) -> None:
    """Which nobody could ever have."""
    with pytest.raises(ValueError, match="default time budget of 300 ms is above the largest, 200 ms"):
        make_settings(tiny_repository, deadlines={"models": {"a": {"default_ms": 300, "max_ms": 200}}})
    with pytest.raises(ValueError, match="above the largest, 30000 ms"):
        Settings.model_validate({"deadlines": {"default_ms": 30_001}})


async def test_what_would_come_too_late_is_refused_at_once(
    tiny_repository: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a time to try again; who has the time is taken; and who comes alone is tried."""
    async with running(make_settings(tiny_repository, http={"request_timeout_s": 300})) as served:
        expecting(served, monkeypatch, 100.0)
        check_answer(await served.classify(JPEG, params={"timeout_ms": 90_000}))  # nobody is in front
        began = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(began + 1)
                refused = await served.classify(JPEG, params={"timeout_ms": 90_000})
                check_problem(refused, 503, "overloaded", "about 100000 ms", "time budget")
                assert 10 <= int(refused.headers["retry-after"]) <= 11
                async with in_background(served.classify(JPEG, params={"timeout_ms": 200_000})) as (second,):
                    await asyncio.sleep(0)
                    gate.release()
                    check_answer(await first)
                    check_answer(await second)
        assert served.outcome("overloaded") == 1
        served.assert_nothing_in_flight()


async def test_quality_is_bent_under_load_and_the_answer_says_so(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the floor of the model or of the request; who names a quality keeps it."""
    settings = make_settings(tiny_repository, runtime={"quality": "full", "min_quality": "balanced"})
    async with running(settings) as served:
        model = expecting(served, monkeypatch, 0.0)
        assert check_answer(await served.classify(JPEG)).quality == "full"
        expecting(served, monkeypatch, 10.0)
        clock = model.quality._clock
        assert check_answer(await served.classify(JPEG)).quality == "full"  # not yet
        monkeypatch.setattr(model.quality, "_clock", lambda: clock() + 1)
        assert check_answer(await served.classify(JPEG)).quality == "balanced"
        assert served.sample("fovea_quality_steps_down", model=MODEL) == 1
        for asked, got in (
            ({"quality": "full"}, "full"),
            ({"min_quality": "full"}, "full"),
            ({"quality": "full", "min_quality": "balanced"}, "balanced"),
        ):
            assert check_answer(await served.classify(JPEG, params=asked)).quality == got
        expecting(served, monkeypatch, 0.0)
        monkeypatch.setattr(model.quality, "_clock", lambda: clock() + 60)
        assert check_answer(await served.classify(JPEG)).quality == "full"
        assert served.sample("fovea_quality_steps_down", model=MODEL) == 0
        above = await served.classify(JPEG, params={"quality": "balanced", "min_quality": "full"})
        check_problem(above, 422, "invalid_request", "min_quality is 'full'", "above the quality 'balanced'")


async def test_each_client_has_a_quota_where_there_are_any(tiny_repository: Path) -> None:
    """Told apart by a header; whoever is over it is told when to come again, and costs the others nothing."""
    quotas = {"images_per_s": 0.01, "burst": 2, "header": "X-Client"}
    async with running(make_settings(tiny_repository, quotas=quotas)) as served:
        for client in ("a", "b"):
            headers = {"X-Client": client}
            check_answer(await served.client.post("/v1/classify", files=as_files([JPEG, JPEG]), headers=headers), 2)
            refused = await served.classify(JPEG, headers=headers)
            check_problem(refused, 429, "quota_exceeded", "0.01 images a second")
            assert 90 <= int(refused.headers["retry-after"]) <= 100
        check_answer(await served.classify(JPEG))
        too_many = await served.client.post("/v1/classify", files=as_files([JPEG] * 3))
        check_problem(too_many, 422, "invalid_request", "at most 2 at once")
        assert served.outcome("ok") == 3
        served.assert_nothing_in_flight()


def bent_by_refusals_alone(repository: Path) -> Settings:
    """From `full` to `balanced`, and never because the wait as such is long."""
    return make_settings(
        repository,
        runtime={"quality": "full", "min_quality": "balanced", "bend_above_ms": 1e6},
        http={"request_timeout_s": 60},
    )


async def test_quality_is_bent_before_a_request_is_refused(
    tiny_repository: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only a faster point can be in time, it is used, though the load as a whole does not ask for it yet."""
    async with running(bent_by_refusals_alone(tiny_repository)) as served:
        model = served.service.registry.get()
        monkeypatch.setattr(model.forecast, "predict_s", lambda _, point: (20.0, 5.0)[point])
        monkeypatch.setattr(model.forecast, "needed_s", lambda predicted_s: predicted_s)
        began = len(gate.batches)
        with gate.held():
            async with in_background(served.classify(JPEG)) as (first,):
                await gate.began(began + 1)
                async with in_background(
                    served.classify(JPEG, params={"timeout_ms": 50_000}), served.classify(JPEG, params={"timeout_ms": 10_000})
                ) as (patient, hasty):
                    refused = await served.classify(JPEG, params={"timeout_ms": 10_000, "quality": "full"})
                    check_problem(refused, 503, "overloaded", "about 20000 ms")
                    gate.release()
                    answers = [check_answer(await each).quality for each in (first, patient, hasty)]
        assert answers == ["full", "full", "balanced"]


async def test_quality_is_bent_where_refusals_are_near(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of requests that would be in time: those after them might not be. Who comes alone is never refused."""
    async with running(bent_by_refusals_alone(tiny_repository)) as served:
        model = served.service.registry.get()
        monkeypatch.setattr(model.forecast, "needed_s", lambda _: 7.0)
        began_at, looks = model.quality._clock(), itertools.count()
        monkeypatch.setattr(model.quality, "_clock", lambda: began_at + 0.05 * next(looks))

        async def ask(*, busy: bool) -> str:
            monkeypatch.setattr(Forecast, "in_front", int(busy))
            return check_answer(await served.classify(JPEG, params={"timeout_ms": 10_000})).quality

        assert [await ask(busy=False) for _ in range(3)] == ["full"] * 3
        assert [await ask(busy=True) for _ in range(3)] == ["full", "balanced", "balanced"]


async def test_many_images_in_one_request_are_no_pressure(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what waits in front of it is; or whoever sends large requests, one after the other, would be answered less well."""
    settings = make_settings(tiny_repository, runtime={"quality": "full", "min_quality": "balanced"})
    async with running(settings) as served:
        model = served.service.registry.get()
        monkeypatch.setattr(model.forecast, "predict_s", lambda images, _: 0.001 if images == 1 else 10.0 * images)
        clock, ahead_s = model.quality._clock, 0.0
        monkeypatch.setattr(model.quality, "_clock", lambda: clock() + ahead_s)
        for _ in range(4):
            ahead_s += 1
            assert check_answer(await served.client.post("/v1/classify", files=as_files([JPEG] * 3)), 3).quality == "full"
