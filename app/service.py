"""The use case, free of HTTP: images in, predictions out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress

from app.classification import Classification, Decoding, Terms
from app.errors import InvalidRequest, ServiceError
from app.imaging.budget import DecodeBudget
from app.loaded_model import Choice, LoadedModel
from app.metrics import Metrics
from app.repository.registry import ModelRegistry
from app.scheduling.admission import Admission, Permit
from app.scheduling.loop_lag import LoopLag
from app.threads import Workers
from app.types import EncodedImage, Prediction

MAX_RESULT_DELAY_S = 0.004  # of a decoded image while others wait to be decoded: two or three small ones come in together


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
        self.decoders = Workers(decode_threads, "decode", max_result_delay_s=MAX_RESULT_DELAY_S)
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
        terms = self.begin(len(images), permit, model=model, top_k=top_k, choice=choice, deadline=deadline, started=started)
        answers: list[Prediction | ServiceError] = []
        try:
            if len(images) == 1:
                answers = [await self._classify_one(images[0], terms)]
            else:
                answers = await asyncio.gather(*(self._classify_one(image, terms) for image in images))
            return answers
        finally:
            terms.learn(answers)

    def begin(
        self,
        num_images: int,
        permit: Permit,
        *,
        model: LoadedModel,
        top_k: int,
        choice: Choice | None,
        deadline: float,
        started: float | None,
    ) -> Terms:
        """Take so many images on, for `start`; see `classify`."""
        num_classes = len(model.labels)
        if not 1 <= top_k <= num_classes:
            raise InvalidRequest(
                f"top_k must be between 1 and {num_classes}, the number of classes of {model.manifest.name}; it is {top_k}"
            )
        if choice is None:
            choice = model.choose(images=num_images)
        permit.take_images(num_images)
        begun = time.perf_counter()
        return Terms(model, top_k, choice, deadline, begun if started is None else started, begun)

    def start(self, image: EncodedImage, terms: Terms) -> Classification:
        """One of the images taken on."""
        classification = Classification(image, terms, self._decoding)
        classification.start()
        return classification

    async def close(self) -> None:
        """Refuse new requests, let those in flight finish, free everything."""
        self.drain()
        self.admission.close()
        await self.admission.wait_idle()
        await self.registry.close()
        self.lag.stop()
        await asyncio.to_thread(self.decoders.close)

    async def _classify_one(self, image: EncodedImage, terms: Terms) -> Prediction | ServiceError:
        classification = self.start(image, terms)
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
