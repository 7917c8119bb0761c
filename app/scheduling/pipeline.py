"""One queue per stage. Instances take batches from them on trips, on which sure images leave and the others go on."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from app.errors import InferenceFailed
from app.exits import ExitPolicy
from app.log import get_logger
from app.metrics import Metrics
from app.scheduling.costs import StageCosts, Way
from app.scheduling.loop_lag import PERIOD_S
from app.scheduling.trip import Report, Rules, Trip, too_late
from app.scheduling.work import Undecoded, WorkItem
from app.types import Array, PipelineResult, RunTime, StageExecutor

log = get_logger(__name__)

HOP_S = 0.0003  # of an instance's time: to hand survivors to a queue and take them up again (docs/adr/0021)
HOLD_S = 0.01  # of the rest of a trip: those who have left it may be told with the others, while others wait
TELL_EVERY_S = PERIOD_S  # then at the latest: when the loop is looked at anyway
TIMER_S = 0.001  # as fine as an event loop's timers are
DECODE_DECAY = 0.5 ** (1 / 64)  # an image's decoding counts half after 64 further ones


class StagedPipeline:
    """The stages of one loaded model.

    Args:
        executor: runs the stages.
        policy: decides who leaves after which stage.
        input_name: the input of stage 0.
        entries: stages that take that input: the first, and in a cascade the first of each further network. An image passes
            over networks in which its operating point lets nobody leave.
        model: the metrics' label.
        max_batch_size: most images in one batch; fewer where `run_times` say that more only take longer.
        max_queue_delay_s: longest wait for a fuller batch after the first image was queued; 0 does not wait.
        run_times: of each stage, as measured at load.
        spread: idle instances share what waits, so that a few images are not done one after the other beside idle cores.
    """

    def __init__(
        self,
        executor: StageExecutor,
        policy: ExitPolicy,
        *,
        input_name: str,
        entries: Sequence[int] = (0,),
        model: str,
        metrics: Metrics,
        max_batch_size: int,
        max_queue_delay_s: float,
        run_times: Sequence[Sequence[RunTime]] | None = None,
        spread: bool = False,
    ) -> None:
        self._executor = executor
        self._input_name = input_name
        self._entries = entries
        self._max_queue_delay_s = max_queue_delay_s
        self._spread = spread
        self.costs = StageCosts(run_times or [()] * policy.num_stages, max_batch_size=max_batch_size)
        self._batch_sizes = self.costs.batch_sizes
        self._jumps = [
            [policy.jump(stage, entries, point) for stage in range(policy.num_stages)] for point in range(policy.num_points)
        ]
        self._ways = [_way(policy, point, jumps) for point, jumps in enumerate(self._jumps)]
        self._needed = [[_needed(way, stage) for stage in range(policy.num_stages)] for way in self._ways]
        self._decode_s = self._decode_weight = 0.0  # sums in which old images count less
        self._rules = Rules(
            policy,
            input_name,
            self._batch_sizes,
            self._next_stage,
            self._compute_s,
            self._mean_decode_s,
            self._goes_on,
            self._join,
            self._report,
        )
        self._metrics = [_StageMetrics(metrics, model, stage) for stage in range(policy.num_stages)]
        self._queues: list[deque[WorkItem]] = [deque() for _ in range(policy.num_stages)]
        self._turns = [0] * policy.num_stages  # of each queue, when a batch was last taken from it
        self._trips: set[Trip] = set()  # under way
        self._reported: deque[tuple[Trip, list[Report]]] = deque()  # what the loop has not heard yet
        self._pending: set[WorkItem] = set()
        self._closing = False
        self._empty = asyncio.Event()  # set by the last one, while closing
        self._loop: asyncio.AbstractEventLoop | None = None
        for stage, (queue, curve) in enumerate(zip(self._queues, self.costs.curves, strict=True)):
            metrics.queue_size.labels(model, str(stage)).set_function(queue.__len__)
            for part in ("fixed_s", "per_image_s"):
                gauge = metrics.stage_cost.labels(model, str(stage), part.removesuffix("_s"))
                gauge.set_function(partial(getattr, curve, part))

    def start(self) -> None:
        """Have the instances fetch their batches, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._executor.start(self._take)

    @property
    def num_images(self) -> int:
        """Images that wait for a stage, or are in one."""
        return len(self._pending)

    def outlook(self, more: int, point: int = 0) -> tuple[float, float]:
        """What lies before the last of so many new images, and what its own way through the stages takes, in seconds.

        All are taken to be at this operating point. The last one is in a batch with as many of the others as fit; what does not
        is before it, shared by all instances, with what the later stages have to do and half of what is running.
        """
        way, instances = self._ways[point], self._executor.num_instances
        costs = self.costs.remaining_s(way)
        decode_s = self.mean_decode_s
        before_s = 0.0
        for stage, queue in enumerate(self._queues):
            if waiting := len(queue):
                before_s += waiting * (costs[stage] + (decode_s if stage in self._entries else 0.0))
        for trip in tuple(self._trips):
            before_s += 0.5 * len(trip.aboard) * costs[trip.stage]
        batch = min(len(self._queues[way.first]) + more, self._batch_sizes[way.first])
        before_s += (more - batch) * (costs[way.first] + decode_s)
        return max(0.0, before_s) / instances, self.costs.path_s(way, batch) + batch * decode_s

    @property
    def mean_decode_s(self) -> float:
        """What decoding an image takes on an instance, lately; 0 before the first."""
        return self._decode_s / self._decode_weight if self._decode_weight else 0.0

    def put(
        self, image: Array | Undecoded, future: asyncio.Future[PipelineResult], point: int = 0, deadline: float = math.inf
    ) -> None:
        """Take one image through the stages it needs; cancelling the future abandons it (see `somebody_left`).

        Args:
            image: what stage 0 takes, without the batch axis, or what makes that.
            future: gets the result; or InferenceFailed, where the run of its batch failed or the pipeline has been closed; or
                DeadlineExceeded; or whatever decoding raised.
            point: operating point by which it may leave; images of all points share their batches.
            deadline: by `time.perf_counter`; a stage that would end after it is not begun.
        """
        item = WorkItem({}, future, queued_at=time.perf_counter(), deadline=deadline, point=point)
        if isinstance(image, Undecoded):
            item.undecoded = image
        else:
            item.inputs = {self._input_name: image}
        if self._closing:
            item.fail(InferenceFailed("the model does not run any more"))
            return
        if self._reported:
            self.catch_up()
        self._pending.add(item)
        self._enqueue(item, self._jumps[point][0])

    async def submit(self, pixels: Array, point: int = 0) -> PipelineResult:
        """As `put`, and wait for the result.

        Raises:
            InferenceFailed: as `put`.
        """
        future: asyncio.Future[PipelineResult] = asyncio.get_running_loop().create_future()
        self.put(pixels, future, point)
        return await future

    def somebody_left(self) -> None:
        """An image was abandoned: if nobody waits for the others of its run either, that is ended."""
        self._executor.end_abandoned()

    async def close(self) -> None:
        """Let work in flight finish; what comes from now on fails."""
        self._closing = True
        if self._pending:
            await self._empty.wait()

    def catch_up(self) -> None:
        """Hear of what instances have done, though none has said that it is urgent; called every `TELL_EVERY_S`."""
        while self._reported:
            self._apply(*self._reported.popleft())

    def _enqueue(self, item: WorkItem, stage: int) -> None:
        queue = self._queues[stage]
        queue.append(item)
        if not self._max_queue_delay_s or len(queue) >= self._batch_sizes[stage]:
            self._executor.wake()
        if self._max_queue_delay_s and self._loop is not None:
            # Also where the batch is full: it may stay behind. A timer may come early, and then nobody would look again.
            for late_s in (0.0, 2 * TIMER_S):
                self._loop.call_later(self._max_queue_delay_s + late_s, self._executor.wake)

    def _apply(self, trip: Trip, reports: Sequence[Report]) -> None:
        """On the event loop: what came of a trip's last steps."""
        if trip.ended:
            self._trips.discard(trip)
        for report in reports:
            if report.stage is None:
                self._learn_decoding(report.images, report.seconds)
            else:
                self._learn_run(report, report.stage)
            for item, result in report.answered:
                self._pending.discard(item)
                item.answer(result)
            for item, error in report.failed:
                self._pending.discard(item)
                item.fail(error)
            for stage, item in report.expired:
                self._pending.discard(item)
                self._metrics[stage].expired.inc()
                item.fail(too_late())
            for stage, item in report.skipped:
                self._pending.discard(item)
                self._metrics[stage].skipped.inc()
            self._pending.difference_update(report.wasted)
            for item, stage in report.handed_on:
                self._enqueue(item, stage)
            for item in report.deferred:
                self._pending.discard(item)
                self._defer(item)
        if self._closing and not self._pending:
            self._empty.set()

    def _learn_run(self, report: Report, stage: int) -> None:
        metrics = self._metrics[stage]
        metrics.batch_size.observe(report.images)
        if report.error is not None:
            metrics.failures.inc()
            return
        metrics.duration.observe(report.seconds)
        if report.answered:
            metrics.exits.inc(len(report.answered))
        if report.wasted:
            metrics.wasted.inc(len(report.wasted))
            metrics.wasted_s.inc(report.seconds * len(report.wasted) / report.images)
        if not report.cut_short:
            self.costs.observe(stage, report.images, report.seconds, report.going_on)

    def _learn_decoding(self, images: int, seconds: float) -> None:
        if images:
            kept = DECODE_DECAY**images
            self._decode_s = kept * self._decode_s + seconds
            self._decode_weight = kept * self._decode_weight + images

    def _defer(self, item: WorkItem) -> None:
        if item.abandoned or item.undecoded is None:
            return
        try:
            item.undecoded.defer()
        except Exception as error:  # the threads have ended: its caller must not wait for ever
            log.exception("an image could not be put off")
            failure = InferenceFailed("the image could not be decoded")
            failure.__cause__ = error
            item.fail(failure)

    # What follows is called on the instances' threads: a deque and a set take care of themselves, and what else is read may
    # be a moment old.

    def _take(self, num_idle: int) -> Trip | None:
        """The next batch, where there is one to be taken; the stages take turns, so that none starves (docs/adr/0006)."""
        # It is taken when an instance is free, so it grows until then (docs/adr/0001).
        shares = 1 + num_idle if self._spread else 1
        while True:
            stage = self._next_queue()
            if stage is None:
                return None
            self._turns[stage] = max(self._turns) + 1
            batch = _pop(self._queues[stage], min(-(-len(self._queues[stage]) // shares), self._batch_sizes[stage]))
            if batch:  # else another instance was faster
                trip = Trip(self._rules, stage, batch)
                self._trips.add(trip)
                return trip

    def _next_queue(self) -> int | None:
        chosen = None
        for stage, queue in enumerate(self._queues):
            if chosen is not None and self._turns[stage] >= self._turns[chosen]:
                continue
            try:
                since = queue[0].queued_at
            except IndexError:
                continue
            delay_s = self._max_queue_delay_s if len(queue) < self._batch_sizes[stage] else 0.0
            if not delay_s or time.perf_counter() - since >= delay_s - TIMER_S:
                chosen = stage
        return chosen

    def _join(self, stage: int, images: int) -> list[WorkItem]:
        """Who waits for a stage that so many go on to, as they do; in a cascade, images may wait that come from elsewhere."""
        return [] if stage in self._entries else _pop(self._queues[stage], self._batch_sizes[stage] - images)

    def _report(self, trip: Trip, reports: list[Report]) -> None:
        if self._loop is None:
            raise RuntimeError("a trip before the pipeline was started")
        urgent = trip.ended or not self._may_wait(trip, reports[-1])
        self._reported.append((trip, reports))
        if urgent:
            try:
                self._loop.call_soon_threadsafe(self.catch_up)
            except RuntimeError:  # the loop was closed: nobody waits any more
                log.warning("a batch ended after the event loop had closed")

    def _may_wait(self, trip: Trip, report: Report) -> bool:
        """Whether the loop may hear of it with the rest of the trip: every wake costs those who wait for an instance."""
        if report.handed_on or report.deferred or not any(self._queues):
            return False
        if self._compute_s(trip.stage, trip.aboard[0].point, len(trip.aboard)) > HOLD_S:
            return False
        soon = time.perf_counter() + 2 * TELL_EVERY_S
        return all(item.deadline > soon for item, _ in report.answered)

    def _next_stage(self, item: WorkItem, stage: int) -> int:
        return self._jumps[item.point][stage]

    def _mean_decode_s(self) -> float:
        return self.mean_decode_s

    def _compute_s(self, stage: int, point: int, images: int) -> float:
        """What an image needs at least from a stage on, in a batch of so many."""
        return sum([self.costs.run_s(needed, images) for needed in self._needed[point][stage]])

    def _goes_on(self, stage: int, item: WorkItem, images: int) -> bool:
        queue = self._queues[stage]
        joined = 0 if stage in self._entries else min(len(queue), self._batch_sizes[stage] - images)
        if len(queue) == joined and not any(other for other in self._queues if other is not queue):
            return True  # nobody else waits for the instance, so what costs least for those aboard
        fixed_s = sum(map(self.costs.fixed_s, self._needed[item.point][stage]))
        return fixed_s * (1 - (images + joined) / self._batch_sizes[stage]) <= HOP_S


class _StageMetrics:
    """Of one stage."""

    def __init__(self, metrics: Metrics, model: str, stage: int) -> None:
        labels = model, str(stage)
        self.batch_size = metrics.batch_size.labels(*labels)
        self.duration = metrics.stage_duration.labels(*labels)
        self.failures = metrics.stage_failures.labels(*labels)
        self.exits = metrics.exits.labels(*labels)
        self.wasted = metrics.wasted.labels(*labels)
        self.wasted_s = metrics.wasted_s.labels(*labels)
        self.skipped = metrics.skipped.labels(*labels)
        self.expired = metrics.expired.labels(*labels)


def _pop(queue: deque[WorkItem], most: int) -> list[WorkItem]:
    """The first ones; on any thread, beside others who do the same."""
    items: list[WorkItem] = []
    try:
        while len(items) < most:
            items.append(queue.popleft())
    except IndexError:
        pass
    return items


def _way(policy: ExitPolicy, point: int, jumps: Sequence[int]) -> Way:
    stages = range(policy.num_stages)
    return Way(
        first=jumps[0],
        after=tuple(jumps[stage + 1] if stage + 1 < policy.num_stages else None for stage in stages),
        nobody_leaves=tuple(policy.nobody_leaves(stage, point) for stage in stages),
    )


def _needed(way: Way, stage: int) -> list[int]:
    """The stages that an image goes through from this one on before any exit may let it leave."""
    stages = [stage]
    while way.nobody_leaves[stages[-1]] and (after := way.after[stages[-1]]) is not None:
        stages.append(after)
    return stages
