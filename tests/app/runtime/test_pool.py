"""Instances are lent fairly, come back whatever happens, and each works on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack

import pytest

from app.runtime.pool import BackendPool
from app.types import Array
from models.manifest import PIXELS
from tests.fakes import VIRTUAL_TIME, FakeBackend, pixels, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL_TIME


def one(number: int) -> Mapping[str, Array]:
    """A batch of one image."""
    return {PIXELS: pixels(number)[None]}


async def run(pool: BackendPool, number: int) -> int:
    async with pool.slot() as run_stage:
        output = await run_stage(0, one(number))
    return int(output.logits.argmax())


async def test_n_instances_run_n_batches_at_once() -> None:
    """All work at the same time, each on its own thread; the next waits until one is free."""
    backends = [FakeBackend() for _ in range(3)]
    pool = BackendPool(backends)
    assert pool.num_instances == 3

    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(backend.held())
        tasks = [asyncio.create_task(run(pool, number)) for number in range(4)]
        for backend in backends:
            await backend.began(1)
        await settle()
        assert [len(backend.runs) for backend in backends] == [1, 1, 1]
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
    pool.close()

    assert len({thread for backend in backends for thread in backend.threads}) == 3
    assert [backend.most_running for backend in backends] == [1, 1, 1]
    assert [len(set(backend.threads)) for backend in backends] == [1, 1, 1]


async def test_instances_may_share_one_backend() -> None:
    """It then runs on as many threads as it stands there, and is closed once."""
    backend = FakeBackend()
    pool = BackendPool([backend, backend])

    with backend.held():
        tasks = [asyncio.create_task(run(pool, number)) for number in range(2)]
        await backend.began(2)
    await asyncio.gather(*tasks)
    pool.close()

    assert len(set(backend.threads)) == backend.most_running == 2
    assert backend.num_closed == 1


async def test_instances_are_lent_first_come_first_served() -> None:
    """Whoever gives an instance back and wants it again at once comes after those who wait already."""
    backend = FakeBackend()
    pool = BackendPool([backend])

    async def twice(number: int) -> None:
        await run(pool, number)
        await run(pool, number + 10)

    await asyncio.gather(*(twice(number) for number in range(4)))
    pool.close()

    assert [number for _, (number,) in backend.runs] == [0, 1, 2, 3, 10, 11, 12, 13]


async def test_a_slot_comes_back_after_an_error() -> None:
    """The error reaches who ran, and the instance is lent again."""
    backend = FakeBackend()
    pool = BackendPool([backend])
    backend.failure = RuntimeError("the engine broke")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="the engine broke"):
            await run(pool, 1)
    backend.failure = None

    assert await run(pool, 2) == 2
    pool.close()


async def test_a_slot_comes_back_after_a_cancelled_run() -> None:
    """The run itself goes on to its end on its thread; the next run of the instance begins only then."""
    backend = FakeBackend()
    pool = BackendPool([backend])

    with backend.held():
        gone = asyncio.create_task(run(pool, 1))
        await backend.began(1)
        gone.cancel()
        await asyncio.wait([gone])
        following = asyncio.create_task(run(pool, 2))
        await settle()
        assert gone.cancelled()
        assert len(backend.runs) == 1
    assert await following == 2
    pool.close()

    assert backend.most_running == 1


async def test_a_cancelled_wait_costs_no_slot() -> None:
    """Who stops waiting for an instance takes none with him, and those behind him move up."""
    backend = FakeBackend()
    pool = BackendPool([backend])

    with backend.held():
        first = asyncio.create_task(run(pool, 1))
        await backend.began(1)
        gone, following = (asyncio.create_task(run(pool, number)) for number in (2, 3))
        await settle()
        gone.cancel()
        await settle()
    assert await asyncio.gather(first, following) == [1, 3]
    pool.close()

    assert [number for _, (number,) in backend.runs] == [1, 3]


async def test_close_waits_for_the_run_and_closes_every_backend() -> None:
    """Afterwards nothing runs any more, and a late caller gets an error instead of waiting."""
    backends = [FakeBackend(), FakeBackend()]
    pool = BackendPool(backends)
    await asyncio.gather(run(pool, 1), run(pool, 2))

    pool.close()

    assert [backend.num_closed for backend in backends] == [1, 1]
    with pytest.raises(RuntimeError):
        await run(pool, 3)


def test_a_pool_without_backends_is_refused() -> None:
    """It could never lend."""
    with pytest.raises(ValueError, match="at least one"):
        BackendPool([])


async def test_a_batch_that_has_the_machine_to_itself_runs_on_the_wide_backend() -> None:
    """Whoever comes meanwhile runs on its instance's own, and so does the next while that is out; all are closed."""
    narrow, wide = FakeBackend(), FakeBackend()
    pool = BackendPool([narrow, narrow], wide)

    with wide.held(), narrow.held():
        first = asyncio.create_task(run(pool, 1))
        await wide.began(1)
        second = asyncio.create_task(run(pool, 2))
        await narrow.began(1)
        wide._open.set()
        assert await first == 1
        third = asyncio.create_task(run(pool, 3))
        await narrow.began(2)
    assert await asyncio.gather(second, third) == [2, 3]
    assert await run(pool, 4) == 4
    assert (wide.runs, narrow.runs) == ([(0, [1]), (0, [4])], [(0, [2]), (0, [3])])
    pool.close()
    assert (wide.num_closed, narrow.num_closed) == (1, 1)
