"""Every image gets its own answer or an error, whatever happens to the others, to the run or to the loops."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from structlog.testing import capture_logs

from app.errors import DeadlineExceeded, InferenceFailed, InvalidImage
from app.metrics import Metrics
from app.runtime.pool import BackendPool
from app.scheduling.loop_lag import LoopLag
from app.scheduling.pipeline import TELL_EVERY_S, StagedPipeline
from app.scheduling.work import Undecoded, WorkItem
from app.types import Array, PipelineResult, RunTime, StageOutput
from models.manifest import PIXELS
from tests.fakes import (
    NUM_STAGES,
    THRESHOLD,
    VIRTUAL_TIME,
    FakeExecutor,
    VirtualTimeLoop,
    answer,
    answered_number,
    make_policy,
    pixels,
    settle,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_clock")]
Answers = list[PipelineResult | BaseException]
SLOW_START = [[RunTime(1, 1.0), RunTime(4, 1.0)]] * NUM_STAGES  # a run costs the same whatever its size: fuller ones pay


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL_TIME


@asynccontextmanager
async def pipeline_on(
    executor: FakeExecutor | BackendPool,
    metrics: Metrics,
    *,
    max_batch_size: int = 4,
    max_queue_delay_s: float = 0.0,
    points: list[list[float | None]] | None = None,
    entries: Sequence[int] = (0,),
    run_times: Sequence[Sequence[RunTime]] | None = None,
    spread: bool = False,
) -> AsyncIterator[StagedPipeline]:
    """A started pipeline, closed afterwards."""
    pipeline = StagedPipeline(
        executor,
        make_policy(points=points),
        input_name=PIXELS,
        entries=entries,
        model="m",
        metrics=metrics,
        max_batch_size=max_batch_size,
        max_queue_delay_s=max_queue_delay_s,
        run_times=run_times,
        spread=spread,
    )
    pipeline.start()
    with capture_logs():  # failures on purpose are not for the terminal
        yield pipeline
        await pipeline.close()
    if isinstance(executor, FakeExecutor):
        await executor.close()
    else:
        executor.close()


async def submit(pipeline: StagedPipeline, *numbers: int) -> list[asyncio.Task[PipelineResult]]:
    """Submit images and let them go as far as they get."""
    tasks = [asyncio.create_task(pipeline.submit(pixels(number))) for number in numbers]
    await settle()
    return tasks


async def answers(tasks: Iterable[asyncio.Future[PipelineResult]]) -> Answers:
    return await asyncio.gather(*tasks, return_exceptions=True)


def failed_numbers(found: Answers) -> list[int]:
    """Which of the answers are errors, all of the one kind that callers are promised."""
    failed = [index for index, each in enumerate(found) if isinstance(each, BaseException)]
    assert all(isinstance(found[index], InferenceFailed) for index in failed)
    return failed


def count(metrics: Metrics, name: str, stage: int) -> float:
    return metrics.registry.get_sample_value(name, {"model": "m", "stage": str(stage)}) or 0.0


async def test_order_and_identity_survive_rebatching_across_stages(metrics: Metrics) -> None:
    """Images that leave at different stages, in batches formed anew at each, all get the answer to themselves."""
    leaves_after = {number: number * 7 % NUM_STAGES for number in range(30)}
    executor = FakeExecutor(leaves_after, instances=2, run_s=0.001)

    async with pipeline_on(executor, metrics, max_batch_size=4, run_times=SLOW_START) as pipeline:
        results = await asyncio.gather(*(pipeline.submit(pixels(number)) for number in range(30)))

    assert list(range(30)) == [answered_number(result) for result in results]
    assert list(leaves_after.values()) == [result.exit.stage for result in results]
    assert [result.exit.confidence for result in results] == [float(result.probabilities.max()) for result in results]
    assert {result.exit.num_stages for result in results} == {NUM_STAGES}
    first_batch_of = {number: index for index, batch in enumerate(executor.batches(0)) for number in batch}
    mixed = [batch for batch in executor.batches(1) if len({first_batch_of[number] for number in batch}) > 1]
    assert mixed, "no batch of stage 1 was formed of images of several batches of stage 0: the test shows nothing"


async def test_images_of_several_operating_points_share_their_batches(metrics: Metrics) -> None:
    """One that wants the full depth goes on where others leave, and all get their own answers."""
    executor = FakeExecutor({})  # sure from the first stage on

    async with pipeline_on(executor, metrics, points=[[2.0, 2.0, None], [THRESHOLD, THRESHOLD, None]]) as pipeline:
        points = [0, 1, 1, 0]
        tasks = [asyncio.create_task(pipeline.submit(pixels(number), point)) for number, point in enumerate(points)]
        await settle()
        results = await asyncio.gather(*tasks)

    assert [result.exit.stage for result in results] == [2, 0, 0, 2]
    assert [answered_number(result) for result in results] == [0, 1, 2, 3]
    assert executor.batches(0) == [[0, 1, 2, 3]]
    assert executor.batches(2) == [[0, 3]]


async def test_networks_in_which_nobody_may_leave_are_passed_over(metrics: Metrics) -> None:
    """Three networks of one stage each: an operating point begins at one, leaves there or goes on to another it names."""
    executor = FakeExecutor({0: 2, 1: 2, 2: 2, 3: 1})
    never, all_leave = 2.0, 0.0
    points = [[never, never, None], [all_leave, never, None], [never, all_leave, None], [THRESHOLD, never, None]]

    async with pipeline_on(executor, metrics, points=points, entries=range(NUM_STAGES)) as pipeline:
        tasks = [asyncio.create_task(pipeline.submit(pixels(number), point)) for number, point in enumerate([0, 1, 2, 3])]
        await settle()
        results = await asyncio.gather(*tasks)

    assert [result.exit.stage for result in results] == [2, 0, 1, 2]
    assert [len(result.compute_s) for result in results] == [1, 1, 1, 2]
    assert sorted(number for batch in executor.batches(0) for number in batch) == [1, 3]
    assert executor.batches(1) == [[2]]
    assert sorted(number for batch in executor.batches(2) for number in batch) == [0, 3]


async def test_each_stage_sees_only_the_survivors_of_the_one_before(metrics: Metrics) -> None:
    """An image that left is never computed again; the counters of exits say where each left."""
    executor = FakeExecutor({1: 1, 2: 2, 3: 2})

    async with pipeline_on(executor, metrics) as pipeline:
        await answers(await submit(pipeline, 0, 1, 2, 3))

    assert executor.batches(0) == [[0, 1, 2, 3]]
    assert executor.batches(1) == [[1, 2, 3]]
    assert executor.batches(2) == [[2, 3]]
    assert [count(metrics, "fovea_exits_total", stage) for stage in range(NUM_STAGES)] == [1, 1, 2]


async def test_the_last_stage_lets_unsure_images_leave(metrics: Metrics) -> None:
    """An image that is never sure gets the last stage's answer, with the confidence that it has."""
    executor = FakeExecutor({5: NUM_STAGES})

    async with pipeline_on(executor, metrics) as pipeline:
        (task,) = await submit(pipeline, 5)

    result = task.result()
    assert answered_number(result) == 5
    assert result.exit.stage == NUM_STAGES - 1
    assert result.exit.confidence == pytest.approx(float(np.e / (np.e + 63)), rel=1e-5)
    assert result.probabilities.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("instances", [1, 2, 3])
async def test_no_batch_exceeds_max_batch_size_at_any_stage(metrics: Metrics, instances: int) -> None:
    """The limit holds for survivors too, who come in whatever numbers the runs before left."""
    executor = FakeExecutor(dict.fromkeys(range(20), 2), instances=instances, run_s=0.001)

    async with pipeline_on(executor, metrics, max_batch_size=3) as pipeline:
        await answers(await submit(pipeline, *range(20)))

    assert sorted(executor.images(2)) == list(range(20))
    assert max(len(batch) for _, batch in executor.runs) == 3
    assert executor.most_running == instances


async def test_timings_tell_wait_and_run_of_every_stage(metrics: Metrics) -> None:
    """Two images, one instance, runs of 8 ms: the second waits until the first has gone all its way."""
    executor = FakeExecutor({1: 1, 2: 1}, run_s=0.008)

    async with pipeline_on(executor, metrics, max_batch_size=1) as pipeline:
        first, second = await asyncio.gather(pipeline.submit(pixels(1)), pipeline.submit(pixels(2)))

    assert executor.runs == [(0, [1]), (1, [1]), (0, [2]), (1, [2])]
    assert first.queue_s == pytest.approx([0.0, 0.0])
    assert second.queue_s == pytest.approx([0.016, 0.0])
    assert first.compute_s == second.compute_s == pytest.approx([0.008, 0.008])
    assert count(metrics, "fovea_stage_duration_seconds_sum", 0) == pytest.approx(0.016)
    assert count(metrics, "fovea_batch_size_count", 0) == 2
    assert count(metrics, "fovea_batch_size_sum", 1) == 2


async def test_a_cancelled_image_is_not_computed_by_the_first_stage(metrics: Metrics) -> None:
    """The caller leaves while the image waits for stage 0: the backend never sees it, and a counter says so."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics) as pipeline:
        with executor.held():
            await submit(pipeline, 1)
            waiting, gone = await submit(pipeline, 2, 3)
            gone.cancel()
            await settle()
        await answers([waiting])

    assert executor.images(0) == [1, 2]
    assert count(metrics, "fovea_skipped_total", 0) == 1


async def test_a_cancelled_image_is_not_computed_by_a_later_stage(metrics: Metrics) -> None:
    """The caller leaves while the image waits for stage 1: it goes no further, the others of its batch do."""
    executor = FakeExecutor({1: 1, 2: 1})

    async with pipeline_on(executor, metrics, run_times=SLOW_START) as pipeline:
        async with asyncio.TaskGroup() as group:
            staying, gone = (group.create_task(pipeline.submit(pixels(number))) for number in (1, 2))
            with executor.held():
                await settle()
                (other,) = await submit(pipeline, 9)  # waits longer than those who come to stage 1
                executor.let_one_finish()
                await settle()
                assert executor.runs == [(0, [1, 2]), (0, [9])]
                gone.cancel()
                await settle()
        await other

    assert answered_number(staying.result()) == 1
    assert executor.images(1) == [1]
    assert count(metrics, "fovea_skipped_total", 1) == 1


@pytest.mark.parametrize("stage", [0, 1], ids=["sure", "unsure"])
async def test_an_image_cancelled_during_its_run_harms_nobody(metrics: Metrics, stage: int) -> None:
    """A run cannot be taken back; but nobody is answered who is not there, the others are, and the next stage is spared."""
    executor = FakeExecutor({1: stage, 2: 1, 3: 0})

    async with pipeline_on(executor, metrics) as pipeline:
        with executor.held():
            gone, staying, sure = await submit(pipeline, 1, 2, 3)
            gone.cancel()
            await settle()
        found = await answers([staying, sure])

    assert [answered_number(result) for result in found if isinstance(result, PipelineResult)] == [2, 3]
    assert executor.images(1) == [2]
    assert count(metrics, "fovea_stage_failures_total", 0) == 0


async def test_nothing_is_kept_of_images_that_are_done(metrics: Metrics) -> None:
    """Answered, failed or abandoned: they are let go while the pipeline goes on, but for the last batch of each loop."""
    executor = FakeExecutor({2: 1})
    rounds = 20

    async with pipeline_on(executor, metrics) as pipeline:
        for _ in range(rounds):
            executor.scripted[1] = RuntimeError("the engine broke")
            with executor.held():
                tasks = await submit(pipeline, 1, 2, 3)
                tasks[2].cancel()
            found = await answers(tasks)
            assert [type(each) for each in found] == [PipelineResult, InferenceFailed, asyncio.CancelledError]
        gc.collect()
        kept = sum(type(each) is WorkItem for each in gc.get_objects())  # isinstance would wake lazy objects of others

    assert kept <= NUM_STAGES * len(tasks) < rounds * len(tasks)


@pytest.mark.parametrize("stage", range(NUM_STAGES))
async def test_a_failing_run_fails_only_its_batch(metrics: Metrics, stage: int) -> None:
    """The images of that batch get InferenceFailed with the cause; the loop goes on and the others get their answers."""
    executor = FakeExecutor(dict.fromkeys(range(6), stage))
    executor.scripted[stage] = cause = RuntimeError("the engine broke")

    async with pipeline_on(executor, metrics, max_batch_size=2) as pipeline:
        found = await answers(await submit(pipeline, *range(6)))

    assert len(executor.batches(stage)) == 3
    assert executor.batches(stage)[0] == failed_numbers(found)
    assert all(error.__cause__ is cause for error in found if isinstance(error, InferenceFailed))
    assert count(metrics, "fovea_stage_failures_total", stage) == 1
    assert count(metrics, "fovea_exits_total", stage) == 4


def short_logits(numbers: list[int], stage: int, leaves_after: Mapping[int, int]) -> StageOutput:
    whole = answer(numbers, stage, leaves_after)
    return StageOutput(whole.logits[:-1], whole.state)


def long_logits(numbers: list[int], stage: int, leaves_after: Mapping[int, int]) -> StageOutput:
    whole = answer([*numbers, 0], stage, leaves_after)
    return StageOutput(whole.logits, whole.state)


def no_logits(numbers: list[int], stage: int, leaves_after: Mapping[int, int]) -> StageOutput:
    return StageOutput(np.zeros((0, 64), dtype=np.float32), {})


def short_state(numbers: list[int], stage: int, leaves_after: Mapping[int, int]) -> StageOutput:
    whole = answer(numbers, stage, leaves_after)
    return StageOutput(whole.logits, {name: value[:0] for name, value in whole.state.items()})


@pytest.mark.parametrize("broken", [short_logits, long_logits, no_logits, short_state])
async def test_a_wrong_number_of_rows_fails_the_batch_and_no_more(metrics: Metrics, broken: object) -> None:
    """Nobody can say whose rows they are, so nobody of this batch gets one; the next batch is served."""
    assert callable(broken)
    leaves_after = dict.fromkeys((1, 2, 3), 1)
    executor = FakeExecutor(leaves_after)
    executor.scripted[0] = broken([1, 2, 3], 0, leaves_after)

    async with pipeline_on(executor, metrics) as pipeline:
        found = await answers(await submit(pipeline, 1, 2, 3))
        after = await answers(await submit(pipeline, 1, 2, 3))

    assert failed_numbers(found) == [0, 1, 2]
    assert failed_numbers(after) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stage", [0, NUM_STAGES - 1])
async def test_logits_that_are_not_finite_fail_only_their_own_image(metrics: Metrics, value: float, stage: int) -> None:
    """One image drives the network out of range: its neighbours in the batch get their answers."""
    leaves_after = dict.fromkeys((1, 2, 3), stage)
    executor = FakeExecutor(leaves_after)
    executor.scripted[stage] = output = answer([1, 2, 3], stage, leaves_after)
    output.logits[1, 40] = value

    async with pipeline_on(executor, metrics) as pipeline:
        found = await answers(await submit(pipeline, 1, 2, 3))

    assert failed_numbers(found) == [1]
    assert [answered_number(result) for result in found if isinstance(result, PipelineResult)] == [1, 3]
    assert count(metrics, "fovea_stage_failures_total", stage) == 0  # the execution itself did not fail


async def test_no_stage_starves_while_another_is_busy(metrics: Metrics) -> None:
    """One instance and a long queue: survivors that are batched anew wait for one run before each of their own."""
    executor = FakeExecutor({0: 2}, run_s=0.001)

    async with pipeline_on(executor, metrics, max_batch_size=2, run_times=SLOW_START) as pipeline:
        await answers(await submit(pipeline, *range(12)))

    way = [index for index, (_, numbers) in enumerate(executor.runs) if 0 in numbers]
    assert way == [0, 2, 4]


async def test_survivors_go_straight_on_where_nothing_is_gained_by_waiting(metrics: Metrics) -> None:
    """Where runs cost by the image, or nobody waits for the instance; else they wait for company."""
    by_the_image = [[RunTime(1, 0.001), RunTime(4, 0.004)]] * NUM_STAGES
    leaves_after = {0: 1, 4: 1}
    ways = []
    for run_times, numbers in ((by_the_image, 8), (SLOW_START, 4), (SLOW_START, 8)):
        executor = FakeExecutor(leaves_after, run_s=0.001)
        async with pipeline_on(executor, metrics, run_times=run_times) as pipeline:
            await answers(await submit(pipeline, *range(numbers)))
        ways.append(executor.runs)

    first, second = (0, [0, 1, 2, 3]), (0, [4, 5, 6, 7])
    assert ways == [[first, (1, [0]), second, (1, [4])], [first, (1, [0])], [first, second, (1, [4, 0])]]


async def test_a_batch_is_no_larger_than_its_stage_makes_worth_it(metrics: Metrics) -> None:
    """Four go through a quick stage together, then two by two: at once where another instance is idle."""
    run_times = [[RunTime(1, 0.001), RunTime(4, 0.004)], *[[RunTime(1, 0.03), RunTime(4, 0.12)]] * (NUM_STAGES - 1)]
    ways = []
    for instances in (1, 2):
        executor = FakeExecutor({}, instances=instances)
        points = [[2.0, THRESHOLD, None]]
        async with pipeline_on(executor, metrics, run_times=run_times, points=points) as pipeline:
            with executor.held():
                futures = await submit(pipeline, *range(4))
                executor.let_one_finish()
                await settle()
                ways.append(list(executor.runs))
            assert [answered_number(result) for result in await answers(futures)] == [0, 1, 2, 3]
            assert executor.batches(1) == [[0, 1], [2, 3]]
    assert ways == [[(0, [0, 1, 2, 3]), (1, [0, 1])], [(0, [0, 1, 2, 3]), (1, [0, 1]), (1, [2, 3])]]


async def first_of_two_has_left(
    pipeline: StagedPipeline, executor: FakeExecutor, deadline: float, *others: int
) -> list[asyncio.Future[PipelineResult]]:
    """Image 1 leaves after stage 0, in which image 2 was with it; others wait."""
    futures = [asyncio.get_running_loop().create_future() for _ in (1, 2, *others)]
    for number, future in zip((1, 2, *others), futures, strict=True):
        pipeline.put(pixels(number), future, deadline=deadline)
    await settle()
    executor.let_one_finish()
    await settle()
    return futures


@pytest.mark.parametrize(
    ("others", "rest_s", "deadline", "told"),
    [([3], 0.001, math.inf, False), ([], 0.001, math.inf, True), ([3], 0.0105, math.inf, True), ([3], 0.001, 0.05, True)],
    ids=["others wait", "nobody waits", "the rest is long", "its time ends soon"],
)
async def test_who_leaves_early_is_told_at_once_unless_every_wake_costs_others(
    metrics: Metrics, others: list[int], rest_s: float, deadline: float, told: bool
) -> None:
    """Then the answer comes with the next image that is put, or when the loop looks by itself, or with the end of the trip."""
    by_the_image = [[RunTime(1, rest_s), RunTime(4, 4 * rest_s)]] * NUM_STAGES
    for then in ("put", "catch_up", "end"):
        executor = FakeExecutor({2: 1})
        async with pipeline_on(executor, metrics, max_batch_size=2, run_times=by_the_image) as pipeline:
            with executor.held():
                until = asyncio.get_running_loop().time() + deadline
                first, *rest = await first_of_two_has_left(pipeline, executor, until, *others)
                assert executor.runs[-1] == (1, [2])
                assert first.done() == told
                if then == "put":
                    rest += await submit(pipeline, 4)
                elif then == "catch_up":
                    pipeline.catch_up()
                else:
                    executor.let_one_finish()
                    await settle()
                assert answered_number(first.result()) == 1
            assert failed_numbers(await answers(rest)) == []


async def test_a_run_that_hangs_keeps_no_answer_back(metrics: Metrics) -> None:
    """Of those who left its batch before."""
    executor = FakeExecutor({2: 1})
    async with pipeline_on(executor, metrics, max_batch_size=2) as pipeline:
        lag = LoopLag(pipeline.catch_up)
        lag.start()
        with executor.held():
            first, *rest = await first_of_two_has_left(pipeline, executor, math.inf, 3)
            assert not first.done()
            await asyncio.sleep(2 * TELL_EVERY_S)
            assert answered_number(first.result()) == 1
            assert not any(future.done() for future in rest)
        lag.stop()
        assert failed_numbers(await answers(rest)) == []


async def test_with_n_instances_n_batches_run_at_once(metrics: Metrics) -> None:
    """Any mixture of stages may fill the instances; no more than there are instances run."""
    executor = FakeExecutor(dict.fromkeys(range(9), 2), instances=3)

    async with pipeline_on(executor, metrics, max_batch_size=1) as pipeline:
        with executor.held():
            tasks = await submit(pipeline, *range(9))
            assert executor.running == 3
            executor.let_one_finish()
            await settle()
            assert executor.running == 3
        assert failed_numbers(await answers(tasks)) == []

    assert executor.most_running == 3


async def test_a_run_that_would_end_its_thread_fails_its_batch_alone(metrics: Metrics) -> None:
    """What is no usual error is told like one; the instance goes on."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics, max_batch_size=1) as pipeline:
        executor.scripted[0] = SystemExit("as sys.exit would")
        found = await answers(await submit(pipeline, 1, 2))

    assert failed_numbers(found) == [0]
    assert count(metrics, "fovea_stage_failures_total", 0) == 1


async def test_close_lets_work_in_flight_finish(metrics: Metrics) -> None:
    """Images at every stage get their answers; new ones are refused from the first moment on."""
    executor = FakeExecutor({number: number for number in range(NUM_STAGES)})

    async with pipeline_on(executor, metrics, max_batch_size=1) as pipeline:
        with executor.held():
            tasks = await submit(pipeline, *range(NUM_STAGES))
            closing = asyncio.create_task(pipeline.close())
            await settle()
            assert not closing.done()
            with pytest.raises(InferenceFailed):
                await pipeline.submit(pixels(7))
        found = await answers(tasks)
        await closing

    assert failed_numbers(found) == []
    assert list(range(NUM_STAGES)) == [answered_number(result) for result in found if isinstance(result, PipelineResult)]
    assert 7 not in executor.images(0)


async def test_closing_twice_is_no_error(metrics: Metrics) -> None:
    """Nor is closing what has nothing to do."""
    async with pipeline_on(FakeExecutor(instances=2), metrics) as pipeline:
        await pipeline.close()


@pytest.mark.parametrize(
    "output",
    [
        RuntimeError("a usual error"),
        SystemExit(),
        StageOutput(np.zeros((0, 64), dtype=np.float32), {}),
        StageOutput(np.full((4, 64), np.nan, dtype=np.float32), {}),
        StageOutput(np.zeros((4, 64), dtype=np.float32), {}),  # unsure, and no state to go on with
        StageOutput(np.zeros((4, 64), dtype=np.float32), {"unknown": np.zeros((4, 1))}),  # which no stage takes
    ],
    ids=["raises", "raises no usual error", "no rows", "NaN", "no state", "unknown state"],
)
@pytest.mark.parametrize("stage", range(NUM_STAGES))
async def test_no_future_is_left_unresolved(metrics: Metrics, output: StageOutput | BaseException, stage: int) -> None:
    """However a run ends, at whatever stage, each image of the batch gets an answer or an error: nobody waits for ever."""
    executor = FakeExecutor(dict.fromkeys(range(4), NUM_STAGES))
    executor.scripted[stage] = output

    async with pipeline_on(executor, metrics, max_batch_size=4) as pipeline:
        tasks = await submit(pipeline, *range(4))
        assert all(task.done() for task in tasks)
        found = await answers(tasks)

    last_stage_took_it = stage == NUM_STAGES - 1 and isinstance(output, StageOutput) and np.isfinite(output.logits).all()
    answered = last_stage_took_it and len(output.logits) == 4  # type: ignore[union-attr]
    assert ([] if answered else [0, 1, 2, 3]) == failed_numbers(found)


async def test_a_batch_is_taken_when_an_instance_is_free(metrics: Metrics) -> None:
    """While every instance is busy it goes on growing; formed earlier, it would hold the first image alone."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics) as pipeline:
        with executor.held():
            tasks = await submit(pipeline, 0)
            for number in (1, 2, 3):
                tasks += await submit(pipeline, number)
        await answers(tasks)

    assert executor.batches(0) == [[0], [1, 2, 3]]


async def test_the_gauge_counts_the_images_that_wait(metrics: Metrics) -> None:
    """Up with each, down when a batch is taken."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics) as pipeline:
        with executor.held():
            tasks = await submit(pipeline, 0, 1)
            assert count(metrics, "fovea_queue_size", 0) == 0
            tasks += await submit(pipeline, 2, 3, 4)
            assert count(metrics, "fovea_queue_size", 0) == 3
        await answers(tasks)
    assert count(metrics, "fovea_queue_size", 0) == 0


async def test_idle_instances_share_what_waits(metrics: Metrics) -> None:
    """Where each is a core: not one after the other beside idle ones; but full batches where all are busy."""
    executor = FakeExecutor(instances=3)

    async with pipeline_on(executor, metrics, spread=True) as pipeline:
        await settle()
        with executor.held():
            tasks = await submit(pipeline, *range(5))
            assert sorted(executor.batches(0)) == [[0, 1], [2, 3], [4]]
            tasks += await submit(pipeline, *range(5, 14))
        await answers(tasks)
    assert executor.batches(0)[3] == [5, 6, 7, 8]


async def test_with_a_queue_delay_images_wait_for_company(metrics: Metrics) -> None:
    """From the first one on, unless the batch is full before; who waited behind a run has waited."""
    executor = FakeExecutor(run_s=0.010)

    async with pipeline_on(executor, metrics, max_queue_delay_s=0.005) as pipeline:
        loop = asyncio.get_running_loop()
        tasks = await submit(pipeline, 0)
        await asyncio.sleep(0.004)
        tasks += await submit(pipeline, 1)
        await asyncio.sleep(0.004)  # 8 ms: those two began at 5
        tasks += await submit(pipeline, 2)
        await answers(tasks)
        begun = loop.time()
        await answers(await submit(pipeline, 3, 4, 5, 6))

    assert executor.batches(0) == [[0, 1], [2], [3, 4, 5, 6]]
    assert executor.began_at == pytest.approx([0.005, 0.015, begun])


async def test_survivors_batched_anew_wait_for_company_too(metrics: Metrics) -> None:
    """Counted from when they joined that stage's queue."""
    executor = FakeExecutor({0: 1}, run_s=0.010)

    async with pipeline_on(executor, metrics, max_queue_delay_s=0.005, run_times=SLOW_START) as pipeline:
        tasks = await submit(pipeline, 0, 1, 2, 3, 4)
        result = await tasks[0]
        await answers(tasks)

    assert executor.runs == [(0, [0, 1, 2, 3]), (0, [4]), (1, [0])]
    assert result.queue_s == pytest.approx([0.0, 0.010])


def undecoded(
    pipeline: StagedPipeline, decode: Callable[[], Array | None], *deferred: Exception
) -> asyncio.Future[PipelineResult]:
    """An image that the pipeline decodes. One that takes too long is brought again as image 7, or `deferred` is raised."""
    future: asyncio.Future[PipelineResult] = asyncio.get_running_loop().create_future()

    def defer() -> None:
        if deferred:
            raise deferred[0]
        pipeline.put(pixels(7), future)

    pipeline.put(Undecoded(decode, defer), future)
    return future


async def test_images_are_decoded_on_the_way(metrics: Metrics) -> None:
    """Each by itself: one that is broken, takes long, or meets a defect costs the others nothing."""
    executor = FakeExecutor()

    def broken() -> Array:
        raise InvalidImage("broken")

    def defect() -> Array:
        raise ZeroDivisionError

    async with pipeline_on(executor, metrics) as pipeline:
        futures = [undecoded(pipeline, decode) for decode in (lambda: pixels(1), broken, lambda: None, lambda: pixels(2))]
        futures += [undecoded(pipeline, defect), undecoded(pipeline, lambda: None, RuntimeError("these threads have ended"))]
        found = await asyncio.gather(*futures, return_exceptions=True)
        assert pipeline.num_images == 0

    assert [answered_number(each) for each in found if isinstance(each, PipelineResult)] == [1, 7, 2]
    assert [type(each) for each in found if isinstance(each, Exception)] == [InvalidImage, ZeroDivisionError, InferenceFailed]
    assert executor.batches(0) == [[1, 2], [7]]


async def test_who_leaves_while_others_are_decoded_is_not_decoded(metrics: Metrics) -> None:
    """Nor computed; it is counted as skipped."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics) as pipeline:
        futures: list[asyncio.Future[PipelineResult]] = []

        def decode_and_lose_the_next() -> Array:
            futures[1].cancel()
            return pixels(1)

        futures += [undecoded(pipeline, decode_and_lose_the_next), undecoded(pipeline, lambda: pixels(2))]
        assert answered_number(await futures[0]) == 1

    assert executor.images(0) == [1]
    assert count(metrics, "fovea_skipped_total", 0) == 1


async def test_what_decoding_takes_is_known(metrics: Metrics) -> None:
    """And counted before those who come, once an image has been decoded."""
    executor = FakeExecutor(run_s=0.0)

    async with pipeline_on(executor, metrics, run_times=SLOW_START) as pipeline:
        loop = asyncio.get_running_loop()

        def slowly() -> Array:
            assert isinstance(loop, VirtualTimeLoop)
            loop.jump(0.5)
            return pixels(1)

        result = await undecoded(pipeline, slowly)
        assert (result.decode_s, result.queue_s) == (pytest.approx(0.5), pytest.approx((0.0,)))
        assert pipeline.mean_decode_s == pytest.approx(0.5)
        before_s, own_s = pipeline.outlook(5)
        assert own_s >= 4 * 0.5
        assert before_s >= 0.5


async def test_images_of_a_batch_share_the_time_for_decoding_it(metrics: Metrics) -> None:
    """Each is decoded after those before it and before those behind it: what is enough for all is enough for each."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics, max_batch_size=8) as pipeline:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)

        def slowly() -> Array:
            loop.jump(0.005)
            return pixels(1)

        async def batch(budget_s: float) -> int:
            futures: list[asyncio.Future[PipelineResult]] = [loop.create_future() for _ in range(8)]
            for future in futures:
                pipeline.put(Undecoded(slowly, lambda: None), future, 0, loop.time() + budget_s)
            found = await asyncio.gather(*futures, return_exceptions=True)
            return sum(isinstance(each, PipelineResult) for each in found)

        assert [await batch(10.0), await batch(0.041), await batch(0.004)] == [8, 8, 0]


async def test_what_decodes_longer_than_usual_is_looked_at_again(metrics: Metrics) -> None:
    """A run that would end too late is not begun."""
    executor = FakeExecutor()

    async with pipeline_on(executor, metrics) as pipeline:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        future: asyncio.Future[PipelineResult] = loop.create_future()

        def very_slowly() -> Array:
            loop.jump(5.0)
            return pixels(1)

        pipeline.put(Undecoded(very_slowly, lambda: None), future, 0, loop.time() + 1.0)
        with pytest.raises(DeadlineExceeded):
            await future
    assert executor.runs == []


class NoMemory:
    """A state that cannot be cut."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: object) -> object:
        raise MemoryError


async def test_a_batch_that_cannot_be_divided_fails_as_a_whole(metrics: Metrics) -> None:
    """Also who had been sure: nobody is forgotten."""
    executor = FakeExecutor({2: 1})
    output = answer([1, 2], 0, executor.leaves_after)
    executor.scripted[0] = StageOutput(output.logits, {"number": NoMemory()})  # type: ignore[dict-item]

    async with pipeline_on(executor, metrics) as pipeline:
        assert failed_numbers(await answers(await submit(pipeline, 1, 2))) == [0, 1]
        assert pipeline.num_images == 0


@pytest.mark.parametrize("spread", [False, True])
async def test_with_a_queue_delay_nobody_stays_behind_a_full_batch(metrics: Metrics, spread: bool) -> None:
    """Who makes a batch full may not be in it."""
    executor = FakeExecutor(instances=2, run_s=0.001)

    async with pipeline_on(executor, metrics, max_batch_size=2, max_queue_delay_s=0.05, spread=spread) as pipeline:
        tasks = await submit(pipeline, 1)
        await asyncio.sleep(0.02)
        tasks += await submit(pipeline, 2, 3)
        async with asyncio.timeout(1):
            assert failed_numbers(await answers(tasks)) == []
