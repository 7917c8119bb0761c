"""What a pipeline knows of the work in it: how much is in front, what cannot be done in time, and what was done for nobody."""

from __future__ import annotations

import asyncio
import math

import pytest

from app.errors import DeadlineExceeded
from app.metrics import Metrics
from app.scheduling.pipeline import StagedPipeline
from app.types import PipelineResult, RunTime
from models.manifest import PIXELS
from tests.fakes import NUM_STAGES, THRESHOLD, VIRTUAL_TIME, FakeExecutor, answered_number, make_policy, pixels, settle

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_clock")]
FULL, BALANCED = 0, 1
POINTS = [[2.0, 2.0, None], [THRESHOLD, THRESHOLD, None]]
RUN_TIMES = [[RunTime(1, 1.25), RunTime(4, 2.0)]] * NUM_STAGES  # a second, and a quarter for each image


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL_TIME


def started(executor: FakeExecutor, metrics: Metrics) -> StagedPipeline:
    pipeline = StagedPipeline(
        executor,
        make_policy(points=POINTS),
        input_name=PIXELS,
        model="m",
        metrics=metrics,
        max_batch_size=4,
        max_queue_delay_s=0.0,
        run_times=RUN_TIMES,
    )
    pipeline.start()
    return pipeline


async def closed(pipeline: StagedPipeline, executor: FakeExecutor) -> None:
    await pipeline.close()
    await executor.close()


def put(
    pipeline: StagedPipeline, numbers: range, *, point: int = BALANCED, left_s: float = math.inf
) -> list[asyncio.Future[PipelineResult]]:
    """Images with so much time left."""
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in numbers]
    for number, future in zip(numbers, futures, strict=True):
        pipeline.put(pixels(number), future, point, loop.time() + left_s)
    return futures


def count(metrics: Metrics, name: str, stage: int = 0) -> float:
    return metrics.registry.get_sample_value(name, {"model": "m", "stage": str(stage)}) or 0.0


async def test_an_empty_pipeline_takes_what_the_stages_take(metrics: Metrics) -> None:
    """All of them while nothing has been seen to leave; of images beyond a batch the first ones are in front."""
    pipeline = started(FakeExecutor(), metrics)
    assert pipeline.outlook(1, FULL) == (0, pytest.approx(3 * 1.25))
    assert pipeline.outlook(4, BALANCED) == (0, pytest.approx(3 * 2.0))
    before_s, own_s = pipeline.outlook(6, FULL)
    assert (before_s, own_s) == (pytest.approx(2 * 3 * 0.5), pytest.approx(3 * 2.0))
    await pipeline.close()


async def test_what_waits_and_half_of_what_runs_is_in_front(metrics: Metrics) -> None:
    """Shared by the instances; an image of four in a batch costs half a second a stage."""
    executor = FakeExecutor({}, instances=2)
    pipeline = started(executor, metrics)
    with executor.held():
        put(pipeline, range(8))
        await settle()
        assert executor.batches(0) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        put(pipeline, range(8, 11))
        before_s, own_s = pipeline.outlook(2, FULL)
        # Eight running, half done, and three waiting, of which one does not fit beside the new ones.
        assert before_s == pytest.approx((8 / 2 + 1) * 1.5 / 2)
        assert own_s == pytest.approx(3 * 2.0)
        assert pipeline.num_images == 11
    await closed(pipeline, executor)
    assert pipeline.num_images == 0


async def test_a_batch_that_leaves_early_makes_the_outlook_better(metrics: Metrics) -> None:
    """For an operating point at which it may; what the others do is theirs."""
    pipeline = started(FakeExecutor({}, run_s=2.0), metrics)
    for _ in range(100):
        await asyncio.gather(*put(pipeline, range(4)))
    _, balanced_s = pipeline.outlook(4, BALANCED)
    _, full_s = pipeline.outlook(4, FULL)
    assert balanced_s < 2.3
    assert full_s == pytest.approx(6.0, rel=0.01)
    await pipeline.close()


@pytest.mark.parametrize(("point", "left_s", "computed"), [(BALANCED, 1.3, True), (FULL, 1.3, False), (FULL, 3.8, True)])
async def test_an_image_must_have_the_time_for_every_stage_it_cannot_leave_before(
    metrics: Metrics, point: int, left_s: float, computed: bool
) -> None:
    """Else it is not begun, and is told so."""
    executor = FakeExecutor({})
    pipeline = started(executor, metrics)
    (future,) = put(pipeline, range(1), point=point, left_s=left_s)
    if computed:
        assert answered_number(await future) == 0
    else:
        with pytest.raises(DeadlineExceeded, match="within its time budget, so it was not begun"):
            await future
        assert executor.runs == []
    assert count(metrics, "fovea_expired_total") == (not computed)
    await pipeline.close()


async def test_who_leaves_during_a_run_is_counted_as_wasted(metrics: Metrics) -> None:
    """Who leaves before it is not computed."""
    executor = FakeExecutor({})
    pipeline = started(executor, metrics)
    with executor.held():
        running = put(pipeline, range(1))
        await settle()
        waiting = put(pipeline, range(1, 2))
        for future in (*running, *waiting):
            future.cancel()
        await settle()
    await settle()
    await pipeline.close()
    assert executor.images(0) == [0]
    assert (count(metrics, "fovea_wasted_total"), count(metrics, "fovea_skipped_total")) == (1, 1)


async def test_a_run_that_nobody_waits_for_is_ended(metrics: Metrics) -> None:
    """When the last of its images has been abandoned; it counts as time wasted, and not as what a run costs."""
    executor = FakeExecutor({})
    pipeline = started(executor, metrics)
    loop = asyncio.get_running_loop()
    with executor.held():
        first, second = put(pipeline, range(2))
        await settle()
        for future, num_images in ((first, 2), (second, 0)):
            await asyncio.sleep(3)
            future.cancel()
            pipeline.somebody_left()
            await settle()
            assert pipeline.num_images == num_images
        assert loop.time() == executor.began_at[0] + 6
        assert pipeline.costs.run_s(0, 2) == pytest.approx(1.5)
        (third,) = put(pipeline, range(2, 3))
        await settle()
        pipeline.somebody_left()
    assert answered_number(await third) == 2
    assert executor.batches(0) == [[0, 1], [2]]
    assert [count(metrics, f"fovea_{name}_total") for name in ("wasted", "wasted_seconds", "stage_failures")] == [2, 6, 0]
    await closed(pipeline, executor)


async def test_costs_follow_the_runs(metrics: Metrics) -> None:
    """And are on the metrics."""
    pipeline = started(FakeExecutor({}, run_s=4.0), metrics)
    for _ in range(600):
        await asyncio.gather(*put(pipeline, range(4)))
    parts = [
        metrics.registry.get_sample_value("fovea_stage_cost_seconds", {"model": "m", "stage": "0", "part": part})
        for part in ("fixed", "per_image")
    ]
    assert None not in parts
    assert parts[0] + 4 * parts[1] == pytest.approx(4.0, rel=0.02)  # type: ignore[operator]
    await pipeline.close()
