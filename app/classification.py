"""One image's way from its bytes to its answer. No task goes along: it is started, and a future tells that it has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import (
    DeadlineExceeded,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    QuotaExceeded,
    RequestError,
    ServiceError,
)
from app.imaging.budget import DecodeBudget, NeedsTime
from app.imaging.preprocess import Pixels, load_pixels
from app.loaded_model import LoadedModel
from app.log import get_logger
from app.postprocess import top_k as top_k_labels
from app.quality import Rung
from app.scheduling.work import Undecoded
from app.threads import Job, Workers
from app.types import EncodedImage, PipelineResult, Prediction, Timings
from models.manifest import PreprocessSpec

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """How the images of one request are to be answered; times by `time.perf_counter`."""

    model: LoadedModel
    top_k: int  # classes per answer, 1 .. number of classes
    rung: Rung  # the operating point
    predicted_s: float  # how long that takes, by `Forecast.predict_s`
    deadline: float  # what cannot be answered by then is dropped before it is computed
    started: float  # the request

    def learn(self, answers: Sequence[Prediction | ServiceError], begun: float) -> None:
        """Have the forecast learn from how the request ended.

        A request that ran out of time teaches that it takes at least so long. One whose client left, or that had no image in
        it, teaches nothing.

        Args:
            begun: when its images were taken on.
        """
        now = time.perf_counter()
        if now >= self.deadline or any(isinstance(answer, Prediction) for answer in answers):
            self.model.forecast.learn(self.predicted_s, now - begun)


@dataclass(frozen=True, slots=True)
class Decoding:
    """What it takes to make pixels of an upload."""

    max_pixels: int
    budget: DecodeBudget
    workers: Workers  # for what instances do not decode


class Classification:
    """Of one image.

    Args:
        image: encoded, as it came.
    """

    __slots__ = ("_begun", "_decoded_at", "_image", "_job", "_load", "_terms", "_workers", "ended")

    def __init__(self, image: EncodedImage, terms: Terms, decoding: Decoding) -> None:
        self._image = image
        self._terms = terms
        self._workers = decoding.workers
        self._begun = self._decoded_at = time.perf_counter()
        self._load = _Load(image, terms.model.manifest.preprocess, decoding.max_pixels, decoding.budget, terms.deadline)
        self._job: Job | None = None
        self.ended: asyncio.Future[PipelineResult] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Have it decoded and computed; then `ended` is done, whatever comes of it."""
        terms = self._terms
        try:
            if terms.model.decodes and isinstance(self._image, bytes):  # what is not made yet may be long
                undecoded = Undecoded(self._load.quick, self._decode_apart)
                terms.model.pipeline.put(undecoded, self.ended, terms.rung.index, terms.deadline)
            else:
                self._decode_apart()
        except Exception as error:  # or its caller would wait for ever
            self._fail(error)

    def abandon(self) -> None:
        """Nobody waits any more."""
        self.ended.cancel()
        if self._job is not None:
            self._job.cancel()
        self._terms.model.pipeline.somebody_left()

    def conclude(self) -> Prediction | ServiceError:
        """The answer, counted, once it has ended."""
        terms = self._terms
        model = terms.model
        try:
            result = self.ended.result()
        except (RequestError, InferenceFailed, DeadlineExceeded) as error:
            model.metrics.images.labels(model.manifest.name, outcome_of(error)).inc()
            return error.with_traceback(None)  # which holds this frame, and so the image, until the collector comes
        except Exception:  # a defect of ours, met by one image: the others of the request have their answers
            log.exception("unexpected error", model=model.manifest.name)
            model.metrics.images.labels(model.manifest.name, "failed").inc()
            return InferenceFailed("the image could not be worked on; the service's log has the cause")
        decode_s = self._decoded_at - self._begun + result.decode_s
        timings = Timings(decode_s, result.queue_s, result.compute_s, time.perf_counter() - terms.started)
        model.observe(timings)
        model.answered_at[terms.rung.index].inc()
        return Prediction(top_k_labels(result.probabilities, model.labels, terms.top_k), result.exit, timings)

    def _decode_apart(self) -> None:
        self._job = self._workers.submit(self._load, self._on_decoded)

    def _on_decoded(self, pixels: Pixels, error: BaseException | None) -> None:
        # Straight on into the pipeline: to wake a coroutine in between would cost as much as the rest of the hop.
        self._decoded_at = time.perf_counter()
        try:
            if error is None:
                self._terms.model.pipeline.put(pixels, self.ended, self._terms.rung.index, self._terms.deadline)
        except Exception as raised:
            error = raised
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


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
