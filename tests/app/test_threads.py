"""Threads for the event loop: every caller gets its own answer, whatever happens to the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from app.threads import Workers

pytestmark = pytest.mark.anyio


async def run(workers: Workers, function: Callable[..., Any], *args: Any) -> Any:
    """Call it on a thread and wait for what comes of it; whoever stops waiting cancels the job."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def done(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    job = workers.submit(partial(function, *args), done)
    try:
        return await future
    except asyncio.CancelledError:
        job.cancel()
        raise


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_every_caller_gets_the_result_of_its_own_job() -> None:
    """A hundred jobs on three threads, off the event loop's thread."""
    workers = Workers(3, "test")
    squares = await asyncio.gather(*(run(workers, lambda x: (x * x, threading.get_ident()), x) for x in range(100)))
    workers.close()

    assert [square for square, _ in squares] == [x * x for x in range(100)]
    assert threading.get_ident() not in {ident for _, ident in squares}


async def test_an_error_reaches_its_caller_and_the_thread_goes_on() -> None:
    """The next job runs as if nothing had happened."""
    workers = Workers(1, "test")

    with pytest.raises(ZeroDivisionError):
        await run(workers, lambda: 1 // 0)
    assert await run(workers, lambda: 5) == 5
    workers.close()


async def test_a_job_whose_caller_has_gone_is_not_run() -> None:
    """While one job holds the only thread, the next is cancelled: it never starts."""
    workers = Workers(1, "test")
    started, release, ran = threading.Event(), threading.Event(), []

    def hold() -> None:
        started.set()
        release.wait(10)

    first = asyncio.create_task(run(workers, hold))
    second = asyncio.create_task(run(workers, ran.append, 1))
    await asyncio.to_thread(started.wait, 10)
    second.cancel()
    await asyncio.wait([second])
    release.set()
    await first
    await run(workers, ran.append, 2)
    workers.close()

    assert ran == [2]


async def test_closed_threads_refuse_and_have_done_what_was_queued() -> None:
    """Nobody waits for ever."""
    workers = Workers(1, "test")
    jobs = [asyncio.create_task(run(workers, lambda x: x, x)) for x in range(5)]
    await asyncio.sleep(0)  # the tasks queue their jobs
    workers.close()

    assert await asyncio.gather(*jobs) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="ended"):
        await run(workers, lambda: None)


async def test_a_result_does_not_wait_for_a_long_job_behind_it() -> None:
    """Results may wait for others, but only so long: the first caller has its answer while the second job still runs."""
    workers = Workers(1, "test", max_result_delay_s=0.002)
    release = threading.Event()

    first = asyncio.create_task(run(workers, lambda: 1))
    others = [asyncio.create_task(run(workers, release.wait, 10)) for _ in range(2)]
    assert await asyncio.wait_for(first, 10) == 1
    assert not any(task.done() for task in others)
    release.set()

    assert await asyncio.gather(*others) == [True, True]
    workers.close()


async def test_the_last_result_wakes_the_loop_at_once() -> None:
    """Nothing to wait for: with a delay of a minute every job is answered, the last one by itself."""
    workers = Workers(2, "test", max_result_delay_s=60.0)

    async with asyncio.timeout(10):
        assert await asyncio.gather(*(run(workers, lambda x: -x, x) for x in range(50))) == [-x for x in range(50)]
        assert await run(workers, lambda: 7) == 7
    workers.close()


async def test_callbacks_get_result_or_error_on_the_loop_and_cancelled_jobs_none() -> None:
    """What `run` is made of, for those who need no coroutine."""
    workers = Workers(1, "test")
    started, release = threading.Event(), threading.Event()
    seen: list[tuple[str, object, int]] = []

    def note(name: str) -> Callable[[object, BaseException | None], None]:
        return lambda result, error: seen.append((name, error or result, threading.get_ident()))

    def hold() -> str:
        started.set()
        release.wait(10)
        return "held"

    workers.submit(hold, note("first"))
    cancelled = workers.submit(lambda: "never", note("second"))
    workers.submit(lambda: 1 // 0, note("third"))
    await asyncio.to_thread(started.wait, 10)
    cancelled.cancel()
    release.set()
    await run(workers, lambda: None)  # behind the others
    workers.close()

    assert [(name, ident) for name, _, ident in seen] == [(name, threading.get_ident()) for name in ("first", "third")]
    assert seen[0][1] == "held"
    assert isinstance(seen[1][1], ZeroDivisionError)


async def test_a_callback_that_raises_costs_the_others_nothing() -> None:
    """Three results in one wake, of which the second cannot be handed over."""
    workers = Workers(1, "test", max_result_delay_s=60.0)
    seen: list[object] = []

    def refuse(_result: object, _error: BaseException | None) -> None:
        raise ValueError("cannot take it")

    workers.submit(lambda: 1, lambda result, _: seen.append(result))
    workers.submit(lambda: 2, refuse)
    assert await run(workers, lambda: 3) == 3
    workers.close()

    assert seen == [1]
