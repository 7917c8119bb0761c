"""The use case, free of HTTP: images in, predictions out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from app.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
    ServiceError,
)
from app.imaging.preprocess import load_pixels
from app.metrics import Metrics
from app.postprocess import top_k as top_k_labels
from app.repository.registry import ModelRegistry
from app.runtime.pool import BackendPool
from app.scheduling.admission import Admission, Permit
from app.scheduling.pipeline import StagedPipeline
from app.types import Array, Prediction, Timings
from models.manifest import HardwareTarget, ModelManifest, PreprocessSpec


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One version, ready to serve."""

    manifest: ModelManifest
    labels: tuple[str, ...]
    target: HardwareTarget
    variant: str
    variant_reason: str
    pipeline: StagedPipeline
    pool: BackendPool

    @property
    def failed(self) -> bool:
        return self.pipeline.failed

    async def close(self) -> None:
        """Let work in flight finish, then end the threads."""
        await self.pipeline.close()
        self.pool.close()


class InferenceService:
    """Classifies images with the loaded models.

    Args:
        max_pixels: largest image accepted, width times height.
        decode_threads: images decoded at once.
    """

    def __init__(
        self,
        registry: ModelRegistry[LoadedModel],
        admission: Admission,
        metrics: Metrics,
        *,
        max_pixels: int,
        decode_threads: int,
    ) -> None:
        self.registry = registry
        self.admission = admission
        self._metrics = metrics
        self._max_pixels = max_pixels
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._draining = False
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
        images: Sequence[bytes],
        permit: Permit,
        *,
        model: LoadedModel,
        top_k: int = 5,
    ) -> list[Prediction | ServiceError]:
        """Classify images; a bad one has its error in its place and costs the others nothing.

        Args:
            images: encoded, as they came.
            permit: takes one image each, all or none.
            model: from `registry.get`.
            top_k: classes per answer, 1 .. number of classes.

        Raises:
            InvalidRequest: `top_k` is out of range.
            Overloaded: there is no room for so many images.
        """
        num_classes = model.manifest.num_classes
        if not 1 <= top_k <= num_classes:
            raise InvalidRequest(
                f"top_k must be between 1 and {num_classes}, the number of classes of {model.manifest.name}; it is {top_k}"
            )
        permit.take_images(len(images))
        if len(images) == 1:
            return [await self._classify_one(images[0], model, top_k)]
        return await asyncio.gather(*(self._classify_one(image, model, top_k) for image in images))

    async def close(self) -> None:
        """Refuse new requests, let those in flight finish, free everything."""
        self.drain()
        self.admission.close()
        await self.registry.close()
        self._decoders.shutdown(wait=True)

    async def _classify_one(self, data: bytes, model: LoadedModel, top_k: int) -> Prediction | ServiceError:
        started = time.perf_counter()
        name = model.manifest.name
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(
                self._decoders, self._load, data, model.manifest.preprocess
            )
            decoded = time.perf_counter()
            result = await model.pipeline.submit(pixels)
        except (RequestError, InferenceFailed) as error:
            self._metrics.images.labels(name, outcome_of(error)).inc()
            return error
        timings = Timings(decoded - started, result.queue_s, result.compute_s, time.perf_counter() - started)
        self._observe(name, timings)
        return Prediction(top_k_labels(result.probabilities, model.labels, top_k), result.exit, timings)

    def _load(self, data: bytes, spec: PreprocessSpec) -> Array:
        return load_pixels(data, spec, max_pixels=self._max_pixels)

    def _observe(self, name: str, timings: Timings) -> None:
        self._metrics.images.labels(name, "ok").inc()
        self._metrics.phase_duration.labels(name, "decode").observe(timings.decode_s)
        self._metrics.phase_duration.labels(name, "queue").observe(sum(timings.queue_s))
        self._metrics.phase_duration.labels(name, "compute").observe(sum(timings.compute_s))


def outcome_of(error: ServiceError | None) -> str:
    """The metrics' word for how a request or an image ended."""
    match error:
        case None:
            return "ok"
        case RequestError() | ModelNotFound():
            return "client_error"
        case Overloaded():
            return "overloaded"
        case DeadlineExceeded():
            return "timeout"
        case _:
            return "failed"
