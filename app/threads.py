"""Threads that do plain work for the event loop.

`concurrent.futures` would do, but its future, condition and callback chain cost as much per job as a small stage takes;
here a job is one queue entry, and results come back to the loop several at a time (docs/benchmarks.md has the ratios).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from app.log import get_logger

log = get_logger(__name__)

JOB_DECAY = 0.5 ** (1 / 64)  # a job's time counts half after 64 further ones
MAX_WAITING_RESULTS = 8  # then the loop is woken, however short they have waited: as many as a batch takes by default

P = ParamSpec("P")
R = TypeVar("R")
Done = Callable[[Any, BaseException | None], None]  # takes a result, or the error there was instead


class Job:
    """A call that waits for a thread, or is on one."""

    __slots__ = ("_call", "_done", "seconds")

    def __init__(self, call: Callable[[], Any], done: Done) -> None:
        self._call: Callable[[], Any] | None = call
        self._done: Done | None = done
        self.seconds = 0.0  # on its thread; 0 where the call was not made

    def cancel(self) -> None:
        """Nobody waits any more: the call is not made if it has not begun, and what it holds is freed now."""
        self._call = self._done = None

    def do(self) -> tuple[Any, BaseException | None]:
        """On a thread: make the call."""
        call = self._call
        if call is None:
            return None, None
        started = time.perf_counter()
        try:
            return call(), None
        except Exception as raised:  # whatever it is, the caller must see it, or it would wait for ever
            if not isinstance(raised, StopIteration):
                return None, raised
            return None, _wrapped(raised)  # a future refuses it
        except BaseException as raised:  # meant to end this thread, not the loop and everybody with it
            return None, _wrapped(raised)
        finally:
            self.seconds = time.perf_counter() - started

    def finish(self, result: Any, error: BaseException | None) -> None:
        """On the loop: hand over what came of it."""
        done = self._done
        self._call = self._done = None  # whoever is told may hold this job: nobody is to wait for the collector
        if done is not None:
            done(result, error)


def _wrapped(raised: BaseException) -> RuntimeError:
    error = RuntimeError(f"the function raised {type(raised).__name__}")
    error.__cause__ = raised
    return error


class Workers:
    """A fixed number of threads and one queue of jobs, first come, first served; for one event loop.

    The queue has no limit of its own: admission bounds what is in it (docs/adr/0002).

    Args:
        num_threads: how many.
        name: theirs.
        max_result_delay_s: while jobs wait for a thread, a result may wait so long for others before the loop is woken for
            all of them. Every wake takes the interpreter lock from a thread that has just got it, so under load fewer are
            better; and what comes in together is batched together. With no job waiting, the loop is woken at once.
    """

    def __init__(self, num_threads: int, name: str, *, max_result_delay_s: float = 0.0) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._results: deque[tuple[Job, Any, BaseException | None]] = deque()
        self._max_result_delay_s = max_result_delay_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self.num_threads = num_threads
        self.unfinished = 0  # jobs whose result the loop has not seen; only the loop counts
        self._job_seconds = self._job_weight = 0.0  # sums in which old jobs count less
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def mean_job_s(self) -> float:
        """What a job takes on its thread, lately; 0 before the first."""
        return self._job_seconds / self._job_weight if self._job_weight else 0.0

    def submit(self, call: Callable[[], Any], done: Done) -> Job:
        """Make the call on a thread, then `done` on the loop, unless the job is cancelled; called on the loop.

        Raises:
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("these threads have ended")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        job = Job(call, done)
        self.unfinished += 1
        self._jobs.put(job)
        if self._max_result_delay_s and self._timer is None:
            self._timer = self._loop.call_later(self._max_result_delay_s, self._on_timer)
        return job

    def close(self) -> None:
        """End the threads when the jobs queued so far are done."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result, error = job.do()
            self._results.append((job, result, error))
            del job, result, error  # an idle thread holds on to nothing
            if not self._max_result_delay_s or len(self._results) >= MAX_WAITING_RESULTS or self._jobs.empty():
                self._wake()

    def _wake(self) -> None:
        if self._loop is None:  # never: a job came from it
            return
        try:
            self._loop.call_soon_threadsafe(self._finish)
        except RuntimeError:  # the loop was closed: nobody waits any more
            log.warning("a result came after the event loop had closed")

    def _on_timer(self) -> None:
        self._timer = None
        self._finish()
        if self.unfinished and self._loop is not None:
            self._timer = self._loop.call_later(self._max_result_delay_s, self._on_timer)

    def _finish(self) -> None:
        while self._results:
            job, result, error = self._results.popleft()
            self.unfinished -= 1
            if job.seconds:
                self._job_seconds = JOB_DECAY * self._job_seconds + job.seconds
                self._job_weight = JOB_DECAY * self._job_weight + 1
            try:
                job.finish(result, error)
            except Exception:  # a defect of whoever gave the callback; the other results are not to wait for ever
                log.exception("a result could not be handed over")
