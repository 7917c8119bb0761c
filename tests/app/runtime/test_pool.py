"""Instances fetch work when they are free, each on a thread of its own, and go on whatever a run does."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import ExitStack, asynccontextmanager

import pytest
from prometheus_client import Counter
from structlog.testing import capture_logs

from app.runtime.health import MAX_FAILED, MAX_GIVEN_UP
from app.runtime.pool import BackendPool
from app.types import RunEnded, StageOutput, StageRun, Work
from models.manifest import PIXELS
from tests.fakes import PATIENCE_S, VIRTUAL_TIME, FakeBackend, pixels

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL_TIME


class Runs:
    """Work of some runs of stage 0, one image each; the future gets what they answered, or what stopped it."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[int | Exception]] = self._loop.create_future()
        self.abandoned = False

    def go(self) -> Generator[StageRun, StageOutput, None]:
        answers: list[int | Exception] = []
        for number in self._numbers:
            try:
                output = yield 0, {PIXELS: pixels(number)[None]}
                answers.append(int(output.logits.argmax()))
            except Exception as error:
                answers.append(error)
        self._loop.call_soon_threadsafe(self.future.set_result, answers)

    def stop(self, error: BaseException) -> None:
        stopped = RuntimeError("stopped")
        stopped.__cause__ = error
        self._loop.call_soon_threadsafe(self.future.set_exception, stopped)


class Queue:
    """Work in the order in which it came, and how many instances were idle beside the one that took each."""

    def __init__(self, pool: BackendPool) -> None:
        self.pool = pool
        self._works: deque[Work] = deque()
        self.num_idle: list[int] = []
        pool.start(self._take)

    def put(self, *numbers: int) -> asyncio.Future[list[int | Exception]]:
        return self.put_work(Runs(*numbers)).future

    def put_work(self, work: Runs) -> Runs:
        self._works.append(work)
        self.pool.wake()
        return work

    def _take(self, num_idle: int) -> Work | None:
        try:
            work = self._works.popleft()
        except IndexError:
            return None
        self.num_idle.append(num_idle)
        return work


@asynccontextmanager
async def working(pool: BackendPool) -> AsyncIterator[Queue]:
    """The pool at work, closed afterwards."""
    with capture_logs():
        yield Queue(pool)
        pool.stop()
        await asyncio.to_thread(pool.close)


async def until(condition: Callable[[], bool]) -> None:
    """In real time, which threads need."""
    for _ in range(int(PATIENCE_S / 0.002)):
        if condition():
            return
        await asyncio.to_thread(threading.Event().wait, 0.002)
    raise AssertionError("that never came")


async def test_n_instances_run_n_batches_at_once() -> None:
    """All work at the same time, each on its own thread; the next waits until one is free."""
    backends = [FakeBackend() for _ in range(3)]
    pool = BackendPool(backends)
    assert pool.num_instances == 3

    async with working(pool) as queue:
        with ExitStack() as stack:
            for backend in backends:
                stack.enter_context(backend.held())
            futures = [queue.put(number) for number in range(4)]
            for backend in backends:
                await backend.began(1)
            assert [len(backend.runs) for backend in backends] == [1, 1, 1]
        assert await asyncio.gather(*futures) == [[0], [1], [2], [3]]

    assert len({thread for backend in backends for thread in backend.threads}) == 3
    assert [backend.most_running for backend in backends] == [1, 1, 1]
    assert [len(set(backend.threads)) for backend in backends] == [1, 1, 1]
    assert queue.num_idle == [2, 1, 0, 0]


async def test_instances_may_share_one_backend() -> None:
    """It then runs on as many threads as it stands there, and is closed once."""
    backend = FakeBackend()

    async with working(BackendPool([backend, backend])) as queue:
        with backend.held():
            futures = [queue.put(number) for number in range(2)]
            await backend.began(2)
        await asyncio.gather(*futures)

    assert len(set(backend.threads)) == backend.most_running == 2
    assert backend.num_closed == 1


async def test_all_work_is_done_however_it_comes() -> None:
    """Much at once and little at a time, by threads that fall asleep in between: nothing is left lying."""
    backend = FakeBackend()

    async with working(BackendPool([backend] * 3)) as queue:
        for size in (40, 1, 1, 7, 2, 1) * 20:
            answers = await asyncio.gather(*(queue.put(number) for number in range(size)))
            assert answers == [[number] for number in range(size)]


async def test_a_runs_error_is_thrown_into_the_work() -> None:
    """Which goes on as it likes; so does the instance."""
    backend = FakeBackend()

    async with working(BackendPool([backend])) as queue:
        backend.failure = RuntimeError("the engine broke")
        assert await queue.put(1, 2) == [backend.failure] * 2
        backend.failure = None
        assert await queue.put(3, 4) == [3, 4]


async def test_a_run_that_would_end_its_thread_stops_the_work_alone() -> None:
    """What is no usual error; the instance goes on."""
    backend = FakeBackend()

    async with working(BackendPool([backend])) as queue:
        backend.failure = SystemExit("as sys.exit would")
        with pytest.raises(RuntimeError, match="stopped") as caught:
            await queue.put(1, 2)
        assert caught.value.__cause__ is backend.failure
        backend.failure = None
        assert await queue.put(3) == [3]


async def test_close_waits_for_the_work_and_closes_every_backend() -> None:
    """Also where it never began."""
    backends = [FakeBackend(), FakeBackend()]
    async with working(BackendPool(backends)) as queue:
        futures = [queue.put(1), queue.put(2)]
        await asyncio.gather(*futures)
    assert [backend.num_closed for backend in backends] == [1, 1]

    never = FakeBackend()
    BackendPool([never]).close()
    assert never.num_closed == 1


def test_a_pool_without_backends_is_refused() -> None:
    """It could never do anything."""
    with pytest.raises(ValueError, match="at least one"):
        BackendPool([])


async def test_a_batch_that_has_the_machine_to_itself_runs_on_the_wide_backend() -> None:
    """Whoever comes meanwhile runs on its instance's own, and so does the next while that is out; all are closed."""
    narrow, wide = FakeBackend(), FakeBackend()

    async with working(BackendPool([narrow, narrow], wide)) as queue:
        with wide.held(), narrow.held():
            first = queue.put(1)
            await wide.began(1)
            second = queue.put(2)
            await narrow.began(1)
            wide._open.set()
            assert await first == [1]
            third = queue.put(3)
            await narrow.began(2)
        assert await asyncio.gather(second, third) == [[2], [3]]
        await until(lambda: not queue.pool._busy)
        assert await queue.put(4) == [4]
    assert (wide.runs, narrow.runs) == ([(0, [1]), (0, [4])], [(0, [2]), (0, [3])])
    assert (wide.num_closed, narrow.num_closed) == (1, 1)


async def test_a_run_that_does_not_end_is_given_up(metrics_counter: Counter) -> None:
    """Its work is stopped, another thread takes its place, and whatever it still brings is not looked at."""
    backend = FakeBackend()
    pool = BackendPool([backend], run_timeout_s=0.2, replaced=metrics_counter)

    async with working(pool) as queue:
        (stuck,) = pool._instances
        with backend.held():
            future = queue.put(1, 2)
            await backend.began(1)
            stuck._began = -1e9  # long ago
            with pytest.raises(RuntimeError, match="stopped") as caught:
                await future
            assert isinstance(caught.value.__cause__, TimeoutError)
            assert pool._instances != [stuck]
        assert await queue.put(3) == [3]
        await until(lambda: not stuck._thread.is_alive())
        assert not pool.failed
    assert metrics_counter._value.get() == 1
    assert [numbers for _, numbers in backend.runs] == [[1], [3]]


async def test_a_run_that_nobody_waits_for_is_ended() -> None:
    """At once, and no other: not the one beside it, nor the next of the same work, for which somebody came."""
    left, stays = FakeBackend(), FakeBackend()
    async with working(BackendPool([left, stays])) as queue:
        works = []
        with left.held(), stays.held():
            for number in (1, 2):
                works.append(queue.put_work(Runs(number, number + 2)))
                await until(lambda: len(left.runs) + len(stays.runs) == len(works))
            queue.pool.end_abandoned()
            (work,) = (work for work, number in zip(works, (1, 2), strict=True) if left.runs == [(0, [number])])
            work.abandoned = True
            queue.pool.end_abandoned()
            await left.began(2)  # the first one has ended, though it is held
            work.abandoned = False
            queue.pool.end_abandoned()
        answers = await asyncio.gather(*(each.future for each in works))
    for each, answer in zip(works, answers, strict=True):
        assert [type(part) for part in answer] == ([RunEnded, int] if each is work else [int, int])


async def test_a_run_given_up_is_also_ended() -> None:
    """So that its thread does not stay, where the engine looks at it."""
    backend = FakeBackend()
    pool = BackendPool([backend], run_timeout_s=0.2)
    async with working(pool) as queue:
        (stuck,) = pool._instances
        with backend.held():
            future = queue.put(1)
            await backend.began(1)
            stuck._began = -1e9
            with pytest.raises(RuntimeError, match="stopped"):
                await future
            await until(lambda: not stuck._thread.is_alive())


async def test_a_run_that_ends_at_once_when_it_is_given_up_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is over before the pool has done with it; the work is stopped all the same."""
    backend = FakeBackend()
    pool = BackendPool([backend], run_timeout_s=0.2)
    async with working(pool) as queue:
        (stuck,) = pool._instances
        start = pool._start_instance

        def start_late(index: int) -> object:
            stuck._thread.join(PATIENCE_S)
            return start(index)

        monkeypatch.setattr(pool, "_start_instance", start_late)
        with backend.held():
            future = queue.put(1)
            await backend.began(1)
            stuck._began = -1e9
            with pytest.raises(RuntimeError, match="stopped"):
                await future


async def test_a_pool_that_gave_up_too_many_runs_has_failed() -> None:
    """Each may hold a core for ever."""
    backend = FakeBackend()
    pool = BackendPool([backend], run_timeout_s=0.2)

    async with working(pool) as queue:
        with backend.held():
            for number in range(MAX_GIVEN_UP):
                assert not pool.failed
                future = queue.put(number)
                await backend.began(number + 1)
                pool._instances[0]._began = -1e9
                with pytest.raises(RuntimeError, match="stopped"):
                    await future
        assert pool.failed


@pytest.mark.parametrize("recovers", ["by a trial", "by a run"])
async def test_a_pool_whose_runs_all_fail_has_failed_until_one_does_not(recovers: str) -> None:
    """As on a GPU that was lost: whoever sends to the ready alone goes elsewhere, so it tries by itself."""
    backend = FakeBackend()
    pool = BackendPool([backend], run_timeout_s=60)

    def look() -> None:
        pool._look()
        pool.stop()  # the next look is ours

    async with working(pool) as queue:
        pool.stop()
        failing = ValueError("broken")
        for number in range(1, MAX_FAILED + 1):
            backend.failure = None if number == 2 else failing
            await queue.put(number)
        assert not pool.failed  # one of them was good
        assert await queue.put(1) == await queue.put(2) == [failing]
        assert pool.failed
        backend.warm_up_failure = failing
        look()
        await until(lambda: backend.warm_ups == 1 and not pool._health._trial.is_alive())
        assert pool.failed
        backend.warm_up_failure = backend.failure = None
        if recovers == "by a trial":
            look()
            await until(lambda: not pool.failed)
            assert backend.warm_ups == 2
        else:
            assert await queue.put(4) == [4]
            assert not pool.failed
            look()
            assert backend.warm_ups == 1


async def test_a_run_that_has_ended_is_not_given_up(metrics_counter: Counter) -> None:
    """However long it took: what it brought has been taken."""
    backend = FakeBackend()
    pool = BackendPool([backend], run_timeout_s=0.2, replaced=metrics_counter)

    async with working(pool) as queue:
        (instance,) = pool._instances
        assert await queue.put(1) == [1]
        assert not instance.give_up(-1.0)
        pool._look()
        assert pool._instances == [instance]
        assert await queue.put(2) == [2]
    assert metrics_counter._value.get() == 0


@pytest.fixture
def metrics_counter() -> Counter:
    return Counter("given_up", "Runs.", registry=None)
