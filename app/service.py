"""The use case, free of every door: a request to classify comes in, predictions go out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast

from app.classification import Classification, Decoding, Terms, outcome_of
from app.errors import InvalidRequest, ServiceError
from app.imaging.budget import DecodeBudget
from app.loaded_model import LoadedModel
from app.metrics import Metrics
from app.repository.registry import ModelRegistry
from app.request import Incoming, Parameters
from app.scheduling.admission import Admission
from app.scheduling.loop_lag import LoopLag
from app.scheduling.quotas import Quotas
from app.settings import DeadlineSettings
from app.threads import Workers
from app.time_budget import TimeBudget
from app.types import EncodedImage, Prediction

MAX_RESULT_DELAY_S = 0.004  # of a decoded image while others wait to be decoded: two or three small ones come in together
DEFAULT_TOP_K = 5
UNKNOWN_MODEL = "unknown"  # the metrics' label of a request that named no model of ours: never the client's own words


class Answer(NamedTuple):
    """What came of a request."""

    terms: Terms
    results: list[Prediction | ServiceError]  # one for each image, in order


class InferenceService:
    """Classifies images with the loaded models.

    Args:
        max_pixels: largest image accepted, width times height.
        decode_threads: images decoded at once, besides those that instances decode.
        max_decode_bytes: memory that all of them together may take, estimated from their headers.
        deadlines: time budgets of requests that name none.
        quotas: how many images each client may send; None: as many as it likes.
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
        deadlines: DeadlineSettings,
        quotas: Quotas | None,
    ) -> None:
        self.registry = registry
        self.admission = admission
        self.decoders = Workers(decode_threads, "decode", max_result_delay_s=MAX_RESULT_DELAY_S)
        self._metrics = metrics
        self._deadlines = deadlines
        self._quotas = quotas
        self._decoding = Decoding(max_pixels, DecodeBudget(max_decode_bytes), self.decoders)
        self._draining = False
        self.lag = LoopLag(self._catch_up)
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

    async def answer(self, request: Incoming) -> Answer:
        """Answer a request to classify, whatever door it came through (docs/adr/0028).

        The order of the checks is the same for all of them: the service is not stopping; the parameters of the head can be
        read; the model, the time budget, `top_k` and the operating point, and whether the answer can be there in time; the
        bytes and the form of the body; the client's quota; room for the images. A request whose body may bring parameters
        has its model and all that follows from it looked at after the body. How it ended is counted, whatever was wrong.

        Args:
            request: at its door.

        Returns:
            One result for each image: a bad one has its error in its place and costs the others nothing.

        Raises:
            ServiceError: the request as a whole is refused, or its only image could not be classified.
        """
        label, outcome = UNKNOWN_MODEL, "failed"
        budget = TimeBudget(request.longest_s, request.started)

        def settle(asked: Parameters, num_images: int) -> Terms:
            nonlocal label
            model = self.registry.get(asked.model, asked.version)
            label = model.manifest.name
            budget.settle(self._deadlines, label, asked.timeout_ms)
            return _terms(model, asked, num_images, budget, request.started)

        try:
            async with budget.timer:
                with self.admission.admit() as permit:
                    asked = request.parameters()
                    if asked.timeout_ms is not None:
                        budget.shorten(asked.timeout_ms / 1000)  # the upload is part of it
                    # Where the head says everything, what comes too late is refused before it is read.
                    terms = None if request.num_images is None else settle(asked, request.num_images)
                    images, said, several = await request.read(permit)
                    if self._quotas is not None and request.client is not None:
                        self._quotas.take(request.client, len(images))
                    if terms is None:
                        terms = settle(asked.merged(said, where="query", other_where="body"), len(images))
                    permit.take_images(len(images))
                    results = await request.while_connected(self._classify(images, terms))
                    if not several and isinstance(results[0], ServiceError):
                        raise cast(
                            "ServiceError", results.pop()
                        )  # no variable has it, or it would hold this frame and the image
            outcome = "ok"
            return Answer(terms, results)
        except TimeoutError as error:
            outcome = "timeout"
            raise budget.exceeded() from error
        except ServiceError as error:
            outcome = outcome_of(error)
            raise
        finally:
            self._metrics.observe_request(label, outcome, time.perf_counter() - request.started)

    async def close(self) -> None:
        """Refuse new requests, let those in flight finish, free everything."""
        self.drain()
        self.admission.close()
        await self.admission.wait_idle()
        await self.registry.close()
        self.lag.stop()
        await asyncio.to_thread(self.decoders.close)

    async def _classify(self, images: Sequence[EncodedImage], terms: Terms) -> list[Prediction | ServiceError]:
        begun = time.perf_counter()
        results: list[Prediction | ServiceError] = []
        try:
            if len(images) == 1:
                results = [await self._classify_one(images[0], terms)]
            else:
                results = await asyncio.gather(*(self._classify_one(image, terms) for image in images))
            return results
        finally:
            terms.learn(results, begun)

    async def _classify_one(self, image: EncodedImage, terms: Terms) -> Prediction | ServiceError:
        classification = Classification(image, terms, self._decoding)
        classification.start()
        try:
            with suppress(Exception):  # `conclude` looks at it
                await classification.ended
        except asyncio.CancelledError:
            classification.abandon()
            raise
        return classification.conclude()

    def _catch_up(self) -> None:
        for _, _, model in self.registry.loaded():
            model.pipeline.catch_up()


def _terms(model: LoadedModel, asked: Parameters, num_images: int, budget: TimeBudget, started: float) -> Terms:
    num_classes = len(model.labels)
    top_k = min(DEFAULT_TOP_K, num_classes) if asked.top_k is None else asked.top_k
    if not 1 <= top_k <= num_classes:
        raise InvalidRequest(
            f"top_k must be between 1 and {num_classes}, the number of classes of {model.manifest.name}; it is {top_k}"
        )
    rung, predicted_s = model.choose(asked.quality, asked.min_quality, images=num_images, budget_s=budget.left_s)
    return Terms(model, top_k, rung, predicted_s, budget.deadline, started)
