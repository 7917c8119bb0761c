"""Threads that do plain work for the event loop.

`concurrent.futures` would do, but its future, condition and callback chain cost as much per job as a small stage takes;
here a job is one queue entry and one call back into the loop (docs/benchmarks.md has the ratio).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from app.log import get_logger

log = get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class _Job:
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    call: Callable[[], Any] | None  # None once its caller has gone: what it holds is freed before its turn comes


class Workers:
    """A fixed number of threads and one queue of jobs, first come, first served.

    The queue has no limit of its own: admission bounds what is in it (docs/adr/0002).
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function on a thread; a job whose caller has gone before its turn is not run.

        Raises:
            RuntimeError: after `close`; and whatever the function raises.
        """
        if self._closed:
            raise RuntimeError("these threads have ended")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        job = _Job(loop, future, lambda: function(*args, **kwargs))
        self._jobs.put(job)
        try:
            return await future
        except asyncio.CancelledError:
            job.call = None
            raise

    def close(self) -> None:
        """End the threads when the jobs queued so far are done."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _do(job)
            del job  # an idle thread holds on to nothing


def _do(job: _Job) -> None:
    call = job.call
    if call is None:
        return
    result: Any = None
    error: BaseException | None = None
    try:
        result = call()
    except StopIteration as raised:  # a future refuses it
        error = RuntimeError("the function raised StopIteration")
        error.__cause__ = raised
    except BaseException as raised:  # whatever it is, the caller must see it, or it would wait for ever
        error = raised
    try:
        job.loop.call_soon_threadsafe(_resolve, job.future, result, error)
    except RuntimeError:  # the loop was closed: nobody waits any more
        log.warning("a result came after the event loop had closed")


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
