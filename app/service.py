"""The use case, free of HTTP: images in, predictions out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from prometheus_client import Counter

from app.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    QuotaExceeded,
    RequestError,
    ServiceError,
)
from app.imaging.budget import DecodeBudget, NeedsTime
from app.imaging.preprocess import Pixels, load_pixels
from app.log import get_logger
from app.metrics import PHASES, Metrics
from app.postprocess import top_k as top_k_labels
from app.quality import Ladder, QualityController, Rung
from app.repository.registry import ModelRegistry
from app.runtime.pool import BackendPool
from app.runtime.targets import TargetProfile
from app.scheduling.admission import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Admission, Permit
from app.scheduling.forecast import Forecast
from app.scheduling.loop_lag import LoopLag
from app.scheduling.pipeline import StagedPipeline
from app.scheduling.work import Undecoded
from app.threads import Job, Workers
from app.types import EncodedImage, PipelineResult, Prediction, Timings
from models.manifest import ModelManifest, PreprocessSpec

log = get_logger(__name__)

BEARABLE = 0.5  # of a request's time budget: beyond it, quality is bent
MIN_BUDGET_S = 0.02  # for that
MAX_RESULT_DELAY_S = 0.004  # of a decoded image while others wait to be decoded: two or three small ones come in together


@dataclass(frozen=True, slots=True)
class Choice:
    """How a request is answered."""

    rung: Rung
    predicted_s: float  # when, by `Forecast.predict_s`


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
    ) -> Choice:
        """The operating point for a request that comes now: what the load asks for, or a faster one where it needs that.

        Args:
            quality: the point that it names; unset: the default one, or a faster one that the load asks for.
            min_quality: the last point that it may be taken down to; unset: the model's own floor, and none for one that
                names its point.
            images: how many it has.
            budget_s: what is left of its time.

        Raises:
            InvalidRequest: there is no such point, or the floor is above the point.
            Overloaded: no point that it takes is fast enough because of those in front; who comes alone is always tried.
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
        self.quality.observe(forecast.expected_s(alone_s) / min(self.bend_above_s, BEARABLE * max(budget_s, MIN_BUDGET_S)))
        point, last = self.quality.range(wanted, floor)
        if point != asked:
            predicted_s = forecast.predict_s(images, point)
        while forecast.busy and (needed_s := forecast.needed_s(predicted_s)) > budget_s:
            if point == last:
                raise Overloaded(
                    f"the answer would take about {1000 * needed_s:.0f} ms and {1000 * max(0.0, budget_s):.0f} are left of the "
                    "time budget; try again later",
                    retry_after_s=min(max(needed_s - budget_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
                )
            point += 1
            predicted_s = forecast.predict_s(images, point)
        return Choice(self.ladder[point], predicted_s)

    @property
    def failed(self) -> bool:
        return self.pool.failed

    async def close(self) -> None:
        """Let work in flight finish, then end the threads."""
        await self.pipeline.close()
        self.pool.stop()
        await asyncio.to_thread(self.pool.close)  # waits for a run whose callers have gone


@dataclass(frozen=True, slots=True)
class _Terms:
    """How the images of one request are to be answered; times by `time.perf_counter`."""

    model: LoadedModel
    top_k: int
    point: int
    deadline: float
    started: float


class InferenceService:
    """Classifies images with the loaded models.

    Args:
        max_pixels: largest image accepted, width times height.
        decode_threads: images decoded at once, besides those that instances decode.
        max_decode_bytes: memory that all of them together may take, estimated from their headers.
    """

    def __init__(
        self,
        registry: ModelRegistry[LoadedModel],
        admission: Admission,
        metrics: Metrics,
        *,
        max_pixels: int,
        decode_threads: int,
        max_decode_bytes: int,
    ) -> None:
        self.registry = registry
        self.admission = admission
        self._metrics = metrics
        self._max_pixels = max_pixels
        self._decode_budget = DecodeBudget(max_decode_bytes)
        self.decoders = Workers(decode_threads, "decode", max_result_delay_s=MAX_RESULT_DELAY_S)
        self._draining = False
        self.lag = LoopLag()
        self.lag.start()
        metrics.loop_lag.set_function(lambda: self.lag.seconds)
        metrics.ready.set_function(lambda: float(self.ready))  # so that it also tells of a model that failed

    @property
    def ready(self) -> bool:
        """New requests are welcome."""
        return self.registry.ready and not self._draining

    def drain(self) -> None:
        """Say 'not ready' from now on; requests are still answered."""
        self._draining = True

    async def classify(
        self,
        images: Sequence[EncodedImage],
        permit: Permit,
        *,
        model: LoadedModel,
        top_k: int = 5,
        choice: Choice | None = None,
        deadline: float = math.inf,
        started: float | None = None,
    ) -> list[Prediction | ServiceError]:
        """Classify images; a bad one has its error in its place and costs the others nothing.

        Args:
            images: encoded, as they came.
            permit: takes one image each, all or none.
            model: from `registry.get`.
            top_k: classes per answer, 1 .. number of classes.
            choice: the operating point, from `model.choose`; unset: what that gives a request that names none.
            deadline: by `time.perf_counter`; what cannot be answered by then is dropped before it is computed.
            started: when the request began, by `time.perf_counter`, for the answer's total; unset: now.

        Raises:
            InvalidRequest: `top_k` is out of range.
            Overloaded: there is no room for so many images.
        """
        num_classes = len(model.labels)
        if not 1 <= top_k <= num_classes:
            raise InvalidRequest(
                f"top_k must be between 1 and {num_classes}, the number of classes of {model.manifest.name}; it is {top_k}"
            )
        if choice is None:
            choice = model.choose(images=len(images))
        permit.take_images(len(images))
        begun = time.perf_counter()
        started = begun if started is None else started
        terms = _Terms(model, top_k, choice.rung.index, deadline, started)
        answers: list[Prediction | ServiceError] = []
        try:
            if len(images) == 1:
                answers = [await self._classify_one(images[0], terms)]
            else:
                answers = await asyncio.gather(*(self._classify_one(image, terms) for image in images))
            return answers
        finally:
            # What ran out of time teaches that it takes at least so long; who left, or sent what is no image, teaches nothing.
            now = time.perf_counter()
            if now >= deadline or any(isinstance(answer, Prediction) for answer in answers):
                model.forecast.learn(choice.predicted_s, now - begun)

    async def close(self) -> None:
        """Refuse new requests, let those in flight finish, free everything."""
        self.drain()
        self.admission.close()
        await self.admission.wait_idle()
        await self.registry.close()
        self.lag.stop()
        await asyncio.to_thread(self.decoders.close)

    async def _classify_one(self, image: EncodedImage, terms: _Terms) -> Prediction | ServiceError:
        begun = decoded_at = time.perf_counter()
        model, point = terms.model, terms.point
        name = model.manifest.name
        future: asyncio.Future[PipelineResult] = asyncio.get_running_loop().create_future()
        load = _Load(image, model.manifest.preprocess, self._max_pixels, self._decode_budget, terms.deadline)
        job: Job | None = None

        def on_decoded(pixels: Pixels, error: BaseException | None) -> None:
            # Straight on into the pipeline: to wake this coroutine in between would cost as much as the rest of the hop.
            nonlocal decoded_at
            decoded_at = time.perf_counter()
            try:
                if error is None:
                    model.pipeline.put(pixels, future, point, terms.deadline)
            except Exception as raised:  # or this image's caller would wait for ever
                error = raised
            if error is not None and not future.done():
                future.set_exception(error)

        def decode_apart() -> None:
            nonlocal job
            job = self.decoders.submit(load, on_decoded)

        try:
            if model.decodes and isinstance(image, bytes):  # what is not made yet may be long
                model.pipeline.put(Undecoded(load.quick, decode_apart), future, point, terms.deadline)
            else:
                decode_apart()
            try:
                result = await future
            except asyncio.CancelledError:
                if job is not None:
                    job.cancel()
                raise
        except (RequestError, InferenceFailed, DeadlineExceeded) as error:
            self._metrics.images.labels(name, outcome_of(error)).inc()
            return error
        except Exception:  # a defect of ours, met by one image: the others of the request have their answers
            log.exception("unexpected error", model=name)
            self._metrics.images.labels(name, "failed").inc()
            return InferenceFailed("the image could not be worked on; the service's log has the cause")
        timings = Timings(
            decoded_at - begun + result.decode_s, result.queue_s, result.compute_s, time.perf_counter() - terms.started
        )
        model.observe(timings)
        model.answered_at[point].inc()
        return Prediction(top_k_labels(result.probabilities, model.labels, terms.top_k), result.exit, timings)


@dataclass(frozen=True, eq=False, slots=True)
class _Load:
    """Makes pixels of an image; called on the thread that is to do that."""

    image: EncodedImage
    spec: PreprocessSpec
    max_pixels: int
    budget: DecodeBudget
    deadline: float

    def __call__(self) -> Pixels:
        """However long it takes."""
        return self._pixels(quick=False)

    def quick(self) -> Pixels | None:
        """None: it would take too long for a thread that others wait for."""
        try:
            return self._pixels(quick=True)
        except NeedsTime:
            return None

    def _pixels(self, *, quick: bool) -> Pixels:
        if time.perf_counter() > self.deadline:
            raise DeadlineExceeded("the time budget ended before the image could be decoded")
        data = self.image if isinstance(self.image, bytes) else self.image()
        try:
            return load_pixels(data, self.spec, max_pixels=self.max_pixels, budget=self.budget, quick=quick)
        except InferenceFailed:
            log.exception("an image could not be decoded")
            raise


def outcome_of(error: ServiceError | None) -> str:
    """The metrics' word for how a request or an image ended."""
    match error:
        case None:
            return "ok"
        case RequestError() | ModelNotFound() | QuotaExceeded():
            return "client_error"
        case Overloaded():
            return "overloaded"
        case DeadlineExceeded():
            return "timeout"
        case _:
            return "failed"
