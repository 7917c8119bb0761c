"""Batches are taken in order, as large as may be, when an instance is free; items whose caller has gone are left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from app.errors import DeadlineExceeded
from app.metrics import Metrics
from app.scheduling.batcher import DynamicBatcher
from app.scheduling.work import WorkItem
from app.types import StageRun
from models.manifest import PIXELS
from tests.fakes import VIRTUAL_TIME, FakeExecutor, make_item, settle

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_clock")]
STAGE = 0


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL_TIME


async def execute(run_stage: StageRun, batch: list[WorkItem]) -> None:
    await run_stage(STAGE, {PIXELS: np.stack([item.inputs[PIXELS] for item in batch])})
    for item in batch:
        if not item.abandoned:
            item.future.cancel()  # done: what it answers is the pipeline's matter


def make_batcher(
    executor: FakeExecutor,
    metrics: Metrics,
    *,
    max_batch_size: int = 4,
    max_queue_delay_s: float = 0.0,
    least_s: Callable[[WorkItem, int], float] | None = None,
) -> DynamicBatcher:
    return DynamicBatcher(
        executor,
        execute,
        max_batch_size=max_batch_size,
        max_queue_delay_s=max_queue_delay_s,
        queue_size=metrics.queue_size.labels("m", "0"),
        skipped=metrics.skipped.labels("m", "0"),
        expired=metrics.expired.labels("m", "0"),
        least_s=least_s,
    )


@asynccontextmanager
async def running(batcher: DynamicBatcher, loops: int = 1) -> AsyncIterator[None]:
    """The batcher's loops run inside, and have neither ended nor failed until then."""
    tasks = [asyncio.create_task(batcher.run()) for _ in range(loops)]
    await settle()
    yield
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def put(batcher: DynamicBatcher, numbers: Sequence[int]) -> list[WorkItem]:
    items = [make_item(number) for number in numbers]
    for item in items:
        batcher.put(item)
    return items


def waiting(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("fovea_queue_size", {"model": "m", "stage": "0"})


def skipped(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("fovea_skipped_total", {"model": "m", "stage": "0"})


async def test_a_batch_never_exceeds_max_batch_size(metrics: Metrics) -> None:
    """Ten items and at most four in a batch: 4, 4, 2, in the order they came."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_batch_size=4)
    put(batcher, range(10))

    async with running(batcher):
        await settle()

    assert executor.batches(STAGE) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_the_batch_is_taken_after_the_slot_is_free(metrics: Metrics) -> None:
    """While every instance is busy the batch goes on growing; formed earlier, it would hold the first item alone."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics)

    async with running(batcher):
        async with executor.slot():
            put(batcher, [1])
            await settle()
            put(batcher, [2])
            await settle()
            put(batcher, [3])
        await settle()

    assert executor.batches(STAGE) == [[1, 2, 3]]


async def test_items_that_come_during_a_run_form_the_next_batch(metrics: Metrics) -> None:
    """A run's batch does not change any more; who comes then waits for the next."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics)

    async with running(batcher):
        with executor.held():
            put(batcher, [1])
            await settle()
            put(batcher, [2, 3])
            await settle()
            assert executor.batches(STAGE) == [[1]]
        await settle()

    assert executor.batches(STAGE) == [[1], [2, 3]]


async def test_a_cancelled_item_is_not_computed(metrics: Metrics) -> None:
    """An item whose caller left before the batch was taken is skipped and counted, and leaves its place to another."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_batch_size=2)

    async with running(batcher):
        async with executor.slot():
            _, second, _ = put(batcher, [1, 2, 3])
            second.future.cancel()
        await settle()

    assert executor.batches(STAGE) == [[1, 3]]
    assert skipped(metrics) == 1


async def test_nothing_runs_when_every_caller_has_gone(metrics: Metrics) -> None:
    """No run is made for an empty batch, the slot comes back, and the loop serves the next item."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics)

    async with running(batcher):
        async with executor.slot():
            for item in put(batcher, [1, 2]):
                item.future.cancel()
        await settle()
        assert executor.runs == []
        put(batcher, [3])
        await settle()

    assert executor.batches(STAGE) == [[3]]
    assert skipped(metrics) == 2


async def test_without_a_queue_delay_an_item_goes_at_once(metrics: Metrics) -> None:
    """With a delay of 0 a free instance never waits for company."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_queue_delay_s=0.0)

    async with running(batcher):
        put(batcher, [1])
        await asyncio.sleep(0.003)
        put(batcher, [2])
        await settle()

    assert executor.batches(STAGE) == [[1], [2]]
    assert executor.began_at == pytest.approx([0.0, 0.003])


async def test_the_queue_delay_starts_with_the_first_item(metrics: Metrics) -> None:
    """Items that come within the delay go together, and the first has waited no longer than it."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_queue_delay_s=0.005)

    async with running(batcher):
        put(batcher, [1])
        await asyncio.sleep(0.003)
        put(batcher, [2])
        await asyncio.sleep(0.001)
        assert executor.runs == []
        await asyncio.sleep(0.010)
        put(batcher, [3])
        await asyncio.sleep(0.010)

    assert executor.batches(STAGE) == [[1, 2], [3]]
    assert executor.began_at == pytest.approx([0.005, 0.014 + 0.005])


async def test_a_full_batch_does_not_wait_for_the_queue_delay(metrics: Metrics) -> None:
    """There is nothing to wait for when the batch cannot grow any more."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_batch_size=3, max_queue_delay_s=0.005)

    async with running(batcher):
        put(batcher, [1, 2])
        await asyncio.sleep(0.001)
        put(batcher, [3])
        await settle()

    assert executor.batches(STAGE) == [[1, 2, 3]]
    assert executor.began_at == pytest.approx([0.001])


async def test_time_spent_behind_a_run_counts_for_the_queue_delay(metrics: Metrics) -> None:
    """An item that has waited for longer than the delay behind another run goes as soon as that run ends."""
    executor = FakeExecutor(run_s=0.020)
    batcher = make_batcher(executor, metrics, max_batch_size=2, max_queue_delay_s=0.005)

    async with running(batcher):
        put(batcher, [1, 2])
        await asyncio.sleep(0.001)
        put(batcher, [3])
        await asyncio.sleep(0.030)

    assert executor.batches(STAGE) == [[1, 2], [3]]
    assert executor.began_at == pytest.approx([0.0, 0.020])


@pytest.mark.parametrize("instances", [1, 2, 3])
async def test_with_n_instances_n_batches_run_at_once(metrics: Metrics, instances: int) -> None:
    """As many loops as instances on one queue: all instances work, each on a batch of its own."""
    executor = FakeExecutor(instances=instances)
    batcher = make_batcher(executor, metrics, max_batch_size=1)

    async with running(batcher, loops=instances):
        with executor.held():
            put(batcher, range(5))
            await settle()
            assert executor.running == instances
        await settle()

    assert executor.batches(STAGE) == [[0], [1], [2], [3], [4]]
    assert executor.most_running == instances


async def test_a_loop_that_finds_the_queue_emptied_gives_its_slot_back(metrics: Metrics) -> None:
    """One item wakes both loops; the one that comes too late must not keep an instance."""
    executor = FakeExecutor(instances=2)
    batcher = make_batcher(executor, metrics)

    async with running(batcher, loops=2):
        with executor.held():
            put(batcher, [1])
            await settle()
            async with executor.slot():  # the other instance is to be had
                assert executor.running == 1
        await settle()

    assert executor.batches(STAGE) == [[1]]


async def test_the_gauge_counts_the_items_that_wait(metrics: Metrics) -> None:
    """Up with each item, down when a batch is taken, whether or not the items are still wanted."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_batch_size=2)

    async with running(batcher):
        with executor.held():
            put(batcher, [1, 2, 3, 4])
            assert waiting(metrics) == 4
            await settle()
            assert waiting(metrics) == 2
        await settle()

    assert waiting(metrics) == 0


@pytest.mark.parametrize("max_queue_delay_s", [0.0, 5.0])
async def test_a_cancelled_loop_gives_its_slot_back(metrics: Metrics, max_queue_delay_s: float) -> None:
    """Whether it lingers, waits or runs: cancelling ends the loop and leaves no instance lent."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_queue_delay_s=max_queue_delay_s)

    with executor.held():
        async with running(batcher):
            put(batcher, [1])
            await settle()

    async with executor.slot():
        assert executor.running == 0


async def test_what_cannot_be_done_in_time_is_not_begun(metrics: Metrics) -> None:
    """An item needs 1 s and 1 s for each in the batch; who has less left is told so, and makes room for who has enough."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_batch_size=2, least_s=lambda _, images: 1.0 + images)
    now = asyncio.get_running_loop().time()
    items = put(batcher, range(4))
    for item, left_s in zip(items, (2.9, 3.1, 2.9, 3.1), strict=True):
        item.deadline = now + left_s

    async with running(batcher):
        await settle()

    assert executor.batches(STAGE) == [[1, 3]]
    for item in (items[0], items[2]):
        with pytest.raises(DeadlineExceeded, match="within its time budget"):
            await item.future
    assert metrics.registry.get_sample_value("fovea_expired_total", {"model": "m", "stage": "0"}) == 2
    assert skipped(metrics) == 0


async def test_a_lone_item_is_measured_by_a_batch_of_one(metrics: Metrics) -> None:
    """Nobody else makes it late."""
    executor = FakeExecutor()
    batcher = make_batcher(executor, metrics, max_batch_size=8, least_s=lambda _, images: 1.0 + images)
    (item,) = put(batcher, [5])
    item.deadline = asyncio.get_running_loop().time() + 2.1

    async with running(batcher):
        await settle()

    assert executor.batches(STAGE) == [[5]]
