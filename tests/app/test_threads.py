"""Threads for the event loop: every caller gets its own answer, whatever happens to the others."""

from __future__ import annotations

import asyncio
import threading

import pytest

from app.threads import Workers

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_every_caller_gets_the_result_of_its_own_job() -> None:
    """A hundred jobs on three threads, off the event loop's thread."""
    workers = Workers(3, "test")
    squares = await asyncio.gather(*(workers.run(lambda x: (x * x, threading.get_ident()), x) for x in range(100)))
    workers.close()

    assert [square for square, _ in squares] == [x * x for x in range(100)]
    assert threading.get_ident() not in {ident for _, ident in squares}


async def test_an_error_reaches_its_caller_and_the_thread_goes_on() -> None:
    """The next job runs as if nothing had happened."""
    workers = Workers(1, "test")

    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 // 0)
    assert await workers.run(lambda: 5) == 5
    workers.close()


async def test_a_job_whose_caller_has_gone_is_not_run() -> None:
    """While one job holds the only thread, the next is cancelled: it never starts."""
    workers = Workers(1, "test")
    started, release, ran = threading.Event(), threading.Event(), []

    def hold() -> None:
        started.set()
        release.wait(10)

    first = asyncio.create_task(workers.run(hold))
    second = asyncio.create_task(workers.run(ran.append, 1))
    await asyncio.to_thread(started.wait, 10)
    second.cancel()
    await asyncio.wait([second])
    release.set()
    await first
    await workers.run(ran.append, 2)
    workers.close()

    assert ran == [2]


async def test_closed_threads_refuse_and_have_done_what_was_queued() -> None:
    """Nobody waits for ever."""
    workers = Workers(1, "test")
    jobs = [asyncio.create_task(workers.run(lambda x: x, x)) for x in range(5)]
    await asyncio.sleep(0)  # the tasks queue their jobs
    workers.close()

    assert await asyncio.gather(*jobs) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="ended"):
        await workers.run(lambda: None)
