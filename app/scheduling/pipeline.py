"""One batcher per stage: images that are sure leave, the survivors of stage k join the queue of stage k + 1."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from app.errors import InferenceFailed
from app.exits import ExitPolicy, with_answers
from app.log import get_logger
from app.metrics import Metrics
from app.scheduling.batcher import DynamicBatcher
from app.scheduling.costs import StageCosts, Way
from app.scheduling.work import WorkItem
from app.types import Array, ExitInfo, FloatArray, PipelineResult, RunTime, StageExecutor, StageOutput, StageRun

log = get_logger(__name__)


class StagedPipeline:
    """The stages of one loaded model.

    Args:
        executor: runs the stages.
        policy: decides who leaves after which stage.
        input_name: the input of stage 0.
        entries: stages that take that input: the first, and in a cascade the first of each further network. An image passes
            over networks in which its operating point lets nobody leave.
        model: the metrics' label.
        run_times: of each stage, as measured at load.
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
    ) -> None:
        self._input_name = input_name
        self._instances = executor.num_instances
        self.costs = StageCosts(run_times or [()] * policy.num_stages, max_batch_size=max_batch_size)
        self._running = [0] * policy.num_stages  # images
        self._jumps = [
            [policy.jump(stage, entries, point) for stage in range(policy.num_stages)] for point in range(policy.num_points)
        ]
        self._ways = [_way(policy, point, jumps) for point, jumps in enumerate(self._jumps)]
        self._needed = [[_needed(way, stage) for stage in range(policy.num_stages)] for way in self._ways]
        self._model = model
        self._stages = [
            _Stage(index, policy, self.costs, self._running, model=model, metrics=metrics, forward=self._forward)
            for index in range(policy.num_stages)
        ]
        self._batchers = [
            DynamicBatcher(
                executor,
                stage.execute,
                max_batch_size=max_batch_size,
                max_queue_delay_s=max_queue_delay_s,
                queue_size=metrics.queue_size.labels(model, str(stage.index)),
                skipped=metrics.skipped.labels(model, str(stage.index)),
                expired=metrics.expired.labels(model, str(stage.index)),
                least_s=partial(self._least_s, stage.index),
            )
            for stage in self._stages
        ]
        for stage, curve in enumerate(self.costs.curves):
            for part in ("fixed_s", "per_image_s"):
                gauge = metrics.stage_cost.labels(model, str(stage), part.removesuffix("_s"))
                gauge.set_function(partial(getattr, curve, part))
        self._loops: list[asyncio.Task[None]] = []
        self._pending: dict[asyncio.Future[PipelineResult], WorkItem] = {}
        self._closing = False
        self.failed = False  # a batch loop died: nothing can be computed any more

    def start(self) -> None:
        """Start the batch loops on the running event loop."""
        for index, batcher in enumerate(self._batchers):
            for _ in range(self._instances):  # so that every instance can work on any stage
                loop = asyncio.create_task(batcher.run(), name=f"{self._model} stage {index}")
                loop.add_done_callback(self._on_loop_end)
                self._loops.append(loop)

    @property
    def num_images(self) -> int:
        """Images that wait for a stage, or are in one."""
        return len(self._pending)

    def outlook(self, more: int, point: int = 0) -> tuple[float, float]:
        """What lies before the last of so many new images, and what its own way through the stages takes, in seconds.

        All are taken to be at this operating point. The last one is in a batch with as many of the others as fit; what does not
        is before it, shared by all instances, with what the later stages have to do and half of what is running.
        """
        way, instances = self._ways[point], self._instances
        costs = self.costs.remaining_s(way)
        before_s = 0.0
        for batcher, running, cost in zip(self._batchers, self._running, costs, strict=True):
            before_s += (len(batcher) + 0.5 * running) * cost
        batch = min(len(self._batchers[way.first]) + more, self.costs.max_batch_size)
        before_s += (more - batch) * costs[way.first]
        return max(0.0, before_s) / instances, self.costs.path_s(way, batch)

    def put(self, pixels: Array, future: asyncio.Future[PipelineResult], point: int = 0, deadline: float = math.inf) -> None:
        """Take one image through the stages it needs; cancelling the future abandons it.

        Args:
            pixels: what stage 0 takes, without the batch axis.
            future: gets the result; or InferenceFailed, where the run of its batch failed or the pipeline cannot run any more;
                or DeadlineExceeded.
            point: operating point by which it may leave; images of all points share their batches.
            deadline: by `time.perf_counter`; a stage that would end after it is not begun.
        """
        item = WorkItem({self._input_name: pixels}, future, queued_at=time.perf_counter(), deadline=deadline, point=point)
        if self.failed or self._closing:
            item.fail(InferenceFailed("the model does not run any more"))
            return
        self._pending[future] = item
        future.add_done_callback(self._forget)
        self._batchers[self._jumps[point][0]].put(item)

    async def submit(self, pixels: Array, point: int = 0) -> PipelineResult:
        """As `put`, and wait for the result.

        Raises:
            InferenceFailed: as `put`.
        """
        future: asyncio.Future[PipelineResult] = asyncio.get_running_loop().create_future()
        self.put(pixels, future, point)
        return await future

    async def close(self) -> None:
        """Let work in flight finish, then end the loops."""
        self._closing = True
        if self._pending:
            await asyncio.wait([*self._pending])
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    def _least_s(self, stage: int, item: WorkItem, images: int) -> float:
        return sum(self.costs.run_s(needed, images) for needed in self._needed[item.point][stage])

    def _forget(self, future: asyncio.Future[PipelineResult]) -> None:
        del self._pending[future]

    def _forward(self, item: WorkItem, stage: int) -> None:
        item.queued_at = time.perf_counter()
        self._batchers[self._jumps[item.point][stage]].put(item)

    def _on_loop_end(self, loop: asyncio.Task[None]) -> None:
        if loop.cancelled() and self._closing:
            return
        error = None if loop.cancelled() else loop.exception()
        log.error("a batch loop ended; the model cannot serve any more", loop=loop.get_name(), exc_info=error)
        self.failed = True
        for item in self._pending.values():
            item.fail(InferenceFailed("the model stopped running"))


class _Stage:
    """What to do with one batch at one stage."""

    def __init__(
        self,
        index: int,
        policy: ExitPolicy,
        costs: StageCosts,
        running: list[int],
        *,
        model: str,
        metrics: Metrics,
        forward: Callable[[WorkItem, int], None],
    ) -> None:
        self.index = index
        self._policy = policy
        self._costs = costs
        self._running = running
        self._forward = forward
        self._batch_size = metrics.batch_size.labels(model, str(index))
        self._duration = metrics.stage_duration.labels(model, str(index))
        self._failures = metrics.stage_failures.labels(model, str(index))
        self._exits = metrics.exits.labels(model, str(index))
        self._wasted = metrics.wasted.labels(model, str(index))

    async def execute(self, run_stage: StageRun, batch: list[WorkItem]) -> None:
        """Run a batch; every item of it leaves, goes on or fails (docs/adr/0007: no second try)."""
        started = time.perf_counter()
        self._running[self.index] += len(batch)
        try:
            self._batch_size.observe(len(batch))
            output = await run_stage(self.index, _stack(batch))
            seconds = time.perf_counter() - started
            self._duration.observe(seconds)
            for item in batch:
                item.queue_s.append(started - item.queued_at)
                item.compute_s.append(seconds)
            going_on = self._route(batch, output)
            self._costs.observe(self.index, len(batch), seconds, going_on)
        except Exception as error:
            self._failures.inc()
            log.exception("stage run failed", stage=self.index, batch=len(batch))
            for item in batch:
                failure = InferenceFailed(f"the model failed at stage {self.index}; the image may be sent again")
                failure.__cause__ = error
                item.fail(failure)
        finally:
            self._running[self.index] -= len(batch)

    def _route(self, batch: Sequence[WorkItem], output: StageOutput) -> int:
        """How many go on."""
        if len(output.logits) != len(batch):
            raise ValueError(f"a batch of {len(batch)} came back as {len(output.logits)}")
        history = None
        if self._policy.patient:
            history = with_answers(np.array([item.history for item in batch]), output.logits)
        with np.errstate(invalid="ignore"):  # rows that are not finite fail below, without a warning for the batch
            leave, confidence = self._policy.decide(self.index, output.logits, [item.point for item in batch], history)
            probabilities = self._policy.probabilities(self.index, output.logits)
        going_on = 0
        finite: Array = np.asarray(np.isfinite(output.logits).all(axis=-1))
        for row, item in enumerate(batch):
            if item.abandoned:
                self._wasted.inc()
                continue
            if not finite[row]:
                item.fail(InferenceFailed(f"the model gave no finite answer at stage {self.index}"))
            elif leave[row]:
                self._exits.inc()
                item.future.set_result(self._result(item, probabilities[row], float(confidence[row])))
            else:
                if history is not None:
                    item.history = int(history[row, 0]), int(history[row, 1])
                item.inputs = {name: value[row] for name, value in output.state.items()}
                self._forward(item, self.index + 1)
                going_on += 1
        return going_on

    def _result(self, item: WorkItem, probabilities: FloatArray, confidence: float) -> PipelineResult:
        exit_ = ExitInfo(stage=self.index, num_stages=self._policy.num_stages, confidence=confidence)
        return PipelineResult(probabilities, exit_, tuple(item.queue_s), tuple(item.compute_s))


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


def _stack(batch: Sequence[WorkItem]) -> dict[str, Array]:
    if len(batch) == 1:  # no copy: NumPy would give up the interpreter lock for it
        return {name: value[np.newaxis] for name, value in batch[0].inputs.items()}
    return {name: np.stack([item.inputs[name] for item in batch]) for name in batch[0].inputs}
