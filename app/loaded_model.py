"""A model that has been loaded: what it says of itself, what runs it, and how a request for it is answered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from prometheus_client import Counter

from app.errors import InvalidRequest, Overloaded
from app.metrics import PHASES, Metrics
from app.quality import Ladder, QualityController, Rung
from app.runtime.pool import BackendPool
from app.runtime.targets import TargetProfile
from app.scheduling.admission import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S
from app.scheduling.forecast import Forecast
from app.scheduling.pipeline import StagedPipeline
from app.types import Timings
from models.manifest import ModelManifest

BEARABLE = 0.5  # of a request's time budget: beyond it, quality is bent
MIN_BUDGET_S = 0.02  # for that


@dataclass(frozen=True)
class LoadedModel:
    """One version, ready to serve."""

    manifest: ModelManifest
    labels: tuple[str, ...]
    profile: TargetProfile
    variant: str
    variant_reason: str
    ladder: Ladder
    default_point: int  # of the ladder
    quality: QualityController
    bend_above_s: float
    pipeline: StagedPipeline
    decodes: bool  # its instances decode what is quick to decode (docs/adr/0021)
    forecast: Forecast
    pool: BackendPool
    metrics: Metrics

    @cached_property
    def observe(self) -> Callable[[Timings], None]:
        """Count an answered image and where its time went; the metrics are looked up once, not for every image."""
        name = self.manifest.name
        answered = self.metrics.images.labels(name, "ok")
        decode, queue, compute = (self.metrics.phase_duration.labels(name, phase) for phase in PHASES)

        def observe(timings: Timings) -> None:
            answered.inc()
            decode.observe(timings.decode_s)
            queue.observe(sum(timings.queue_s))
            compute.observe(sum(timings.compute_s))

        return observe

    @cached_property
    def answered_at(self) -> list[Counter]:
        """The metric of each operating point, looked up once."""
        return [self.metrics.answered.labels(self.manifest.name, rung.name) for rung in self.ladder]

    def choose(
        self,
        quality: str | None = None,
        min_quality: str | None = None,
        *,
        images: int = 1,
        budget_s: float = math.inf,
    ) -> tuple[Rung, float]:
        """The operating point for a request that comes now: what the load asks for, or a faster one where it needs that.

        With it the seconds until the answer, by `Forecast.predict_s`.

        Args:
            quality: the point that it names; unset: the default one, or a faster one that the load asks for.
            min_quality: the last point that it may be taken down to; unset: the model's own floor, and none for one that
                names its point.
            images: how many it has.
            budget_s: what is left of its time.

        Raises:
            InvalidRequest: there is no such point, or the floor is above the point.
            Overloaded: no point that it takes is fast enough, because of those in front. A request with nothing ahead of it is
                never refused.
        """
        wanted, floor = (None if name is None else self.ladder.index(name) for name in (quality, min_quality))
        start = self.default_point if wanted is None else wanted
        if floor is not None and floor < start:
            raise InvalidRequest(f"min_quality is {min_quality!r}, which is above the quality {self.ladder[start].name!r}")
        forecast = self.forecast
        asked = self.quality.current
        predicted_s = forecast.predict_s(images, asked)
        # What others leave to wait for counts, not how much this request brings itself.
        alone_s = predicted_s if images == 1 else forecast.predict_s(1, asked)
        shared_s = max(budget_s, MIN_BUDGET_S)  # what pressure is told in shares of
        pressure = forecast.expected_s(alone_s) / min(self.bend_above_s, BEARABLE * shared_s)
        in_front = forecast.in_front
        self.quality.observe(pressure, forecast.needed_s(alone_s) / shared_s if in_front else 0.0)
        point, last = self.quality.range(wanted, floor)
        if point != asked:
            predicted_s = forecast.predict_s(images, point)
        while in_front and (needed_s := forecast.needed_s(predicted_s)) > budget_s:
            if point == last:
                raise Overloaded(
                    f"the answer would take about {1000 * needed_s:.0f} ms and {1000 * max(0.0, budget_s):.0f} are left of the "
                    "time budget; try again later",
                    retry_after_s=min(max(needed_s - budget_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
                )
            point += 1
            predicted_s = forecast.predict_s(images, point)
        return self.ladder[point], predicted_s

    @property
    def failed(self) -> bool:
        return self.pool.failed

    async def close(self) -> None:
        """Let work in flight finish, then end the threads."""
        await self.pipeline.close()
        self.pool.stop()
        await asyncio.to_thread(self.pool.close)  # waits for a run whose callers have gone
