"""Faults put in on purpose: only the requests that meet one fail, with a clear error; readiness tells the truth; it goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from app.runtime.backend import RunControl
from app.runtime.health import MAX_FAILED, MAX_GIVEN_UP
from app.runtime.ort_backend import OrtBackend
from app.types import Array, StageOutput
from tests.app.http.served import JPEG, MODEL, PNG, Served, check_answer, check_problem, in_background, make_settings, running
from tests.fakes import PATIENCE_S
from tests.images import truncated

pytestmark = pytest.mark.anyio
Run = Callable[[OrtBackend, int, Mapping[str, Array]], StageOutput]
Fault = Callable[[StageOutput], StageOutput]


class Faults:
    """What happens to the next runs, one each."""

    def __init__(self) -> None:
        self.next: list[Fault] = []
        self.let_go = threading.Event()  # runs that hang end

    def raises(self, error: BaseException) -> Fault:
        def fault(_: StageOutput) -> StageOutput:
            raise error

        return fault

    def hangs(self) -> Fault:
        def fault(output: StageOutput) -> StageOutput:
            assert self.let_go.wait(PATIENCE_S)
            return output

        return fault


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    faults = Faults()
    run: Run = OrtBackend.run

    def faulty(backend: OrtBackend, stage: int, inputs: Mapping[str, Array], control: RunControl | None = None) -> StageOutput:
        output = run(backend, stage, inputs, control)
        return faults.next.pop(0)(output) if faults.next else output

    monkeypatch.setattr(OrtBackend, "run", faulty)
    yield faults
    faults.let_go.set()


async def assert_well(served: Served) -> None:
    """The next request is answered, nothing is held, and it says that it is ready."""
    check_answer(await served.classify(PNG))
    assert (await served.client.get("/health/ready")).status_code == 200
    served.assert_nothing_in_flight()


FAULTS: dict[str, tuple[Callable[[Faults], Fault], str]] = {
    "raises": (lambda faults: faults.raises(RuntimeError("broken")), "failed at stage 0"),
    "out of memory": (lambda faults: faults.raises(MemoryError()), "failed at stage 0"),
    "ends its thread": (lambda faults: faults.raises(SystemExit(3)), "failed at stage 0"),
    "interrupted": (lambda faults: faults.raises(KeyboardInterrupt()), "failed at stage 0"),
    "NaN": (lambda _: lambda output: StageOutput(np.full_like(output.logits, np.nan), output.state), "no finite answer"),
    "infinite": (lambda _: lambda output: StageOutput(np.full_like(output.logits, np.inf), output.state), "no finite answer"),
    "a row too few": (lambda _: lambda output: StageOutput(output.logits[1:], output.state), "failed at stage 0"),
    "hangs": (lambda faults: faults.hangs(), "failed at stage 0"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_faulty_run_fails_its_own_requests_alone(tiny_repository: Path, faults: Faults, name: str) -> None:
    """With 500 and a sentence; those before and after it are answered, without a restart."""
    make, words = FAULTS[name]
    async with running(make_settings(tiny_repository, runtime={"run_timeout_s": 0.3})) as served:
        check_answer(await served.classify(JPEG))
        faults.next = [make(faults)]
        check_problem(await served.classify(JPEG), 500, "inference_failed", words)
        await assert_well(served)
        assert (served.outcome("failed"), served.outcome("ok")) == (1, 2)
        assert served.sample("fovea_runs_given_up_total", model=MODEL) == (name == "hangs")


async def test_a_run_that_hangs_costs_others_only_its_instance(tiny_repository: Path, faults: Faults) -> None:
    """With two instances the other one goes on meanwhile; what the stuck run brings at last is nobody's answer."""
    settings = make_settings(tiny_repository, runtime={"run_timeout_s": 0.5, "instances": 2}, batching={"max_batch_size": 1})
    async with running(settings) as served:
        faults.next = [faults.hangs()]
        async with in_background(served.classify(JPEG)) as (stuck,):
            while faults.next:  # noqa: ASYNC110 - taken on another thread
                await asyncio.sleep(0.001)
            for _ in range(5):
                check_answer(await served.classify(PNG))
            assert not stuck.done()
            check_problem(await stuck, 500, "inference_failed", "failed at stage 0")
        faults.let_go.set()
        for _ in range(5):
            await assert_well(served)


async def test_too_many_runs_that_hang_turn_readiness_red(tiny_repository: Path, faults: Faults) -> None:
    """Each leaves a stuck thread behind, so that a restart is the better way; until then it answers what it can."""
    async with running(make_settings(tiny_repository, runtime={"run_timeout_s": 0.02})) as served:
        for number in range(MAX_GIVEN_UP):
            assert (await served.client.get("/health/ready")).status_code == 200, number
            faults.next = [faults.hangs()]
            check_problem(await served.classify(JPEG), 500, "inference_failed")
        assert (await served.client.get("/health/ready")).status_code == 503
        assert (await served.client.get("/health/live")).status_code == 200
        check_answer(await served.classify(JPEG))


async def test_readiness_is_red_while_all_runs_fail(tiny_repository: Path, faults: Faults) -> None:
    """And green again by itself when they do not, though nobody sends anything."""
    async with running(make_settings(tiny_repository, runtime={"run_timeout_s": 0.4})) as served:
        faults.next = [faults.raises(RuntimeError("the device was lost"))] * (MAX_FAILED + 20)
        for _ in range(MAX_FAILED):
            assert (await served.client.get("/health/ready")).status_code == 200
            check_problem(await served.classify(JPEG), 500, "inference_failed")
        assert (await served.client.get("/health/ready")).status_code == 503
        assert served.sample("fovea_ready") == 0
        async with asyncio.timeout(PATIENCE_S):
            while (await served.client.get("/health/ready")).status_code != 200:  # noqa: ASYNC110 - a thread tries
                await asyncio.sleep(0.01)
        assert len(faults.next) < 20  # it was tried meanwhile, and failed
        faults.next = []
        await assert_well(served)


async def test_faults_among_good_requests_meet_nobody_else(tiny_repository: Path, faults: Faults) -> None:
    """Sixty requests at once, bad images and failing runs among them: every one is answered once, the good ones as alone."""
    async with running(make_settings(tiny_repository, batching={"max_batch_size": 2})) as served:
        alone = check_answer(await served.classify(JPEG)).results[0].predictions
        faults.next = [lambda output: output, faults.raises(RuntimeError("broken"))] * 5
        bodies = [truncated(JPEG) if number % 6 == 5 else JPEG for number in range(60)]
        responses = await asyncio.gather(*(served.classify(body) for body in bodies))
        statuses = [response.status_code for response in responses]
        bad = [number for number, body in enumerate(bodies) if body != JPEG]
        assert [statuses[number] for number in bad] == [422] * len(bad)
        good = [number for number, status in enumerate(statuses) if status == 200]
        assert 5 <= statuses.count(500) <= 10
        assert len(good) + statuses.count(500) + len(bad) == 60
        assert alone is not None
        for number in good:
            (result,) = check_answer(responses[number]).results
            assert result.predictions is not None
            assert [score.label for score in result.predictions] == [score.label for score in alone]
        await assert_well(served)
