"""A queue, and the loop that takes batches from it when an instance is free."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from prometheus_client import Counter, Gauge

from app.errors import DeadlineExceeded
from app.scheduling.work import WorkItem
from app.types import StageExecutor, StageRun

Execute = Callable[[StageRun, list[WorkItem]], Awaitable[None]]
Least = Callable[[WorkItem, int], float]


class DynamicBatcher:
    """The queue of one stage.

    Args:
        executor: lends instances.
        execute: runs one batch; resolves or forwards every item of it, whatever happens, and never raises.
        max_batch_size: most items in one batch.
        max_queue_delay_s: longest wait for a fuller batch after the first item was queued; 0 does not wait.
        queue_size: gauge of the items that wait.
        skipped: counter of items whose caller had gone.
        expired: counter of items that could not be done in time.
        least_s: seconds that an item needs at least from here on, in a batch of so many; None: nothing is known.
    """

    def __init__(
        self,
        executor: StageExecutor,
        execute: Execute,
        *,
        max_batch_size: int,
        max_queue_delay_s: float,
        queue_size: Gauge,
        skipped: Counter,
        expired: Counter,
        least_s: Least | None = None,
    ) -> None:
        self._executor = executor
        self._execute = execute
        self._max_batch_size = max_batch_size
        self._max_queue_delay_s = max_queue_delay_s
        self._skipped = skipped
        self._expired = expired
        self._least_s = least_s
        self._items: deque[WorkItem] = deque()
        queue_size.set_function(self._items.__len__)  # looked up when somebody asks, not set for every item
        self._not_empty = asyncio.Event()
        self._full = asyncio.Event()  # enough for a whole batch

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._items)

    def put(self, item: WorkItem) -> None:
        """Queue an item. Never blocks: admission bounds the queue."""
        self._items.append(item)
        self._update()

    async def run(self) -> None:
        """Take and execute batches until cancelled; several of these may run on one queue."""
        while True:
            await self._not_empty.wait()
            await self._linger()
            # The batch is taken after the slot is free: it keeps growing while we wait (docs/adr/0001).
            async with self._executor.slot() as run_stage:
                batch = self._take()
                if batch:
                    await self._execute(run_stage, batch)

    async def _linger(self) -> None:
        if not self._max_queue_delay_s or not self._items:
            return
        already_waited = time.perf_counter() - self._items[0].queued_at
        try:
            async with asyncio.timeout(self._max_queue_delay_s - already_waited):
                await self._full.wait()
        except TimeoutError:
            return  # the longest wait is over: go with what there is

    def _take(self) -> list[WorkItem]:
        batch: list[WorkItem] = []
        now, size = time.perf_counter(), min(len(self._items), self._max_batch_size)
        while self._items and len(batch) < self._max_batch_size:
            item = self._items.popleft()
            if item.abandoned:
                self._skipped.inc()
            elif now + (self._least_s(item, size) if self._least_s is not None else 0.0) > item.deadline:
                self._expired.inc()
                item.fail(DeadlineExceeded("the image could not be computed within its time budget, so it was not begun"))
            else:
                batch.append(item)
        self._update()
        return batch

    def _update(self) -> None:
        waiting = len(self._items)
        _set(self._not_empty, waiting > 0)
        _set(self._full, waiting >= self._max_batch_size)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
