"""The use case without HTTP: images in, predictions or errors out, in order; one permit for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import app.classification
from app import errors
from app.assembly import open_service
from app.classification import outcome_of
from app.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    InvalidRequest,
    Overloaded,
    QuotaExceeded,
    ServiceError,
    UnsupportedImage,
)
from app.imaging.cost import QUICK_BYTES, QUICK_PIXELS
from app.metrics import OUTCOMES, Metrics
from app.request import LocalRequest, Parameters
from app.service import InferenceService
from app.types import EncodedImage, Prediction
from tests.app.http.served import MODEL, Gate, in_background, make_settings, until
from tests.images import make_jpeg, make_png, photo, truncated

pytestmark = pytest.mark.anyio

JPEG, PNG = make_jpeg(photo(seed=3)), make_png(photo(seed=4))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Before every run of the backends opened from now on."""
    return Gate().installed(monkeypatch)


@pytest.fixture
async def service(tiny_repository: Path, metrics: Metrics) -> AsyncIterator[InferenceService]:
    """With the tiny model, room for 8 images, and batches of one image."""
    settings = make_settings(
        tiny_repository,
        limits={"max_in_flight": 8},
        batching={"max_batch_size": 1},
        http={"max_images_per_request": 8},
    )
    service = await open_service(settings, metrics)
    yield service
    await service.close()


async def classify(service: InferenceService, *images: bytes, top_k: int = 10) -> list[Prediction | ServiceError]:
    return (await service.answer(LocalRequest(images, Parameters(top_k=top_k)))).results


@pytest.mark.parametrize(
    ("image", "decode_threads", "where"),
    [
        (JPEG, 0, ["instance"]),
        (JPEG, 1, ["decode"]),
        (JPEG + bytes(QUICK_BYTES), 0, ["instance", "decode"]),
        (make_png(np.zeros((1, QUICK_PIXELS + 1, 3), np.uint8)), 0, ["instance", "decode"]),
        (lambda: JPEG, 0, ["decode"]),
    ],
    ids=["small", "asked for", "many bytes", "many pixels", "base64"],
)
async def test_images_are_decoded_where_they_are_computed_unless_that_takes_long(
    tiny_repository: Path,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    image: EncodedImage,
    decode_threads: int,
    where: list[str],
) -> None:
    """Or threads for it are asked for. The answer is the same, and its time is told."""
    threads: list[str] = []

    def load_pixels(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name.partition("-")[0])
        return load(*args, **kwargs)

    load = app.classification.load_pixels
    monkeypatch.setattr(app.classification, "load_pixels", load_pixels)
    service = await open_service(make_settings(tiny_repository, limits={"decode_threads": decode_threads}), metrics)
    (answer,) = (await service.answer(LocalRequest([image]))).results
    assert isinstance(answer, Prediction)
    assert answer.timings.decode_s > 0
    await service.close()
    assert threads == where


async def test_answers_are_in_the_order_of_the_images_with_errors_beside(service: InferenceService, metrics: Metrics) -> None:
    """What cannot be read costs the others nothing: they get what they get alone."""
    (jpeg,), (png,) = await classify(service, JPEG), await classify(service, PNG)
    answers = await classify(service, b"text", JPEG, truncated(JPEG), PNG, b"")
    assert [UnsupportedImage, Prediction, InvalidImage, Prediction, InvalidImage] == [type(answer) for answer in answers]
    for alone, together in ((jpeg, answers[1]), (png, answers[3])):
        assert isinstance(alone, Prediction)
        assert isinstance(together, Prediction)
        assert alone.predictions == together.predictions  # batches of one: the very same computation
        assert alone.exit == together.exit
    labels = {"model": MODEL}
    assert metrics.registry.get_sample_value("fovea_images_total", {**labels, "outcome": "ok"}) == 4
    assert metrics.registry.get_sample_value("fovea_images_total", {**labels, "outcome": "client_error"}) == 3
    assert service.admission.images_in_flight == 0


async def test_a_prediction_holds_together(service: InferenceService) -> None:
    """Probabilities of all classes sum to one, and timings to no more than the total."""
    (answer,) = await classify(service, JPEG)
    assert isinstance(answer, Prediction)
    assert {score.index for score in answer.predictions} == set(range(10))
    assert np.isclose(1, sum(score.probability for score in answer.predictions), atol=1e-5)
    assert answer.exit.num_stages == 3
    assert answer.exit.stage + 1 == len(answer.timings.queue_s) == len(answer.timings.compute_s)
    spent = answer.timings.decode_s + sum(answer.timings.queue_s) + sum(answer.timings.compute_s)
    assert 0 < spent <= answer.timings.total_s


@pytest.mark.parametrize("top_k", [0, -1, 11, 100_000])
async def test_top_k_beyond_the_classes_is_refused_before_anything_is_taken(service: InferenceService, top_k: int) -> None:
    """In words that name the model and its classes."""
    with pytest.raises(InvalidRequest, match=f"between 1 and 10.*{MODEL}.*{top_k}"):
        await classify(service, JPEG, top_k=top_k)
    assert service.admission.images_in_flight == 0


async def test_no_images_are_answered_with_nothing(service: InferenceService) -> None:
    """As when none could be taken out of a body."""
    assert await classify(service) == []


async def test_images_are_admitted_all_or_none(service: InferenceService, gate: Gate) -> None:
    """One more than there is room for: refused whole, and nothing of it is computed."""
    with pytest.raises(Overloaded, match="at most 8"):
        await classify(service, *[JPEG] * 9)
    assert gate.batches == []
    assert service.admission.images_in_flight == 0


async def test_a_failed_run_is_the_answer_of_its_image(service: InferenceService, gate: Gate, metrics: Metrics) -> None:
    """Not an exception: the images beside it are answered."""
    with gate.held():
        async with in_background(classify(service, JPEG, PNG)) as (both,):
            await gate.began(1)
            await until(lambda: metrics.registry.get_sample_value("fovea_queue_size", {"model": MODEL, "stage": "0"}) == 1)
            gate.failures.append(RuntimeError("broken"))
            gate.release()
            answers = await both
    assert {Prediction, InferenceFailed} == {type(answer) for answer in answers}
    assert metrics.registry.get_sample_value("fovea_images_total", {"model": MODEL, "outcome": "failed"}) == 1


async def test_a_cancelled_caller_leaves_nothing_behind(service: InferenceService, gate: Gate, metrics: Metrics) -> None:
    """Its images leave the queue, and its permits come back while the backend is still busy."""
    with gate.held():
        async with in_background(classify(service, *[JPEG] * 4)) as (caller,):
            await gate.began(1)
            await until(lambda: metrics.registry.get_sample_value("fovea_queue_size", {"model": MODEL, "stage": "0"}) == 3)
            caller.cancel()
            await until(caller.done)
            assert service.admission.images_in_flight == 0
    await until(lambda: metrics.registry.get_sample_value("fovea_skipped_total", {"model": MODEL, "stage": "0"}) == 3)
    assert gate.batches == [(0, 1)]


async def test_closing_finishes_what_is_in_flight_and_refuses_the_rest(
    tiny_repository: Path, metrics: Metrics, gate: Gate
) -> None:
    """Not ready at once; the image under way gets its answer; a new one is told to go elsewhere."""
    service = await open_service(make_settings(tiny_repository), metrics)
    assert service.ready
    assert metrics.registry.get_sample_value("fovea_ready") == 1
    begun = len(gate.batches)
    with gate.held():
        async with in_background(classify(service, JPEG)) as (caller,):
            await gate.began(begun + 1)
            closing = asyncio.ensure_future(service.close())
            await until(lambda: not service.ready)
            assert metrics.registry.get_sample_value("fovea_ready") == 0
            with pytest.raises(Overloaded, match="another instance"):
                service.admission.admit()
            assert not closing.done()
            gate.release()
            (answer,) = await caller
            await closing
    assert isinstance(answer, Prediction)


def test_every_error_has_an_outcome() -> None:
    """Of those that the metric's label may have; the caller's faults are told from ours."""
    assert outcome_of(None) == "ok"
    expected = {
        "invalid_request": "client_error",
        "payload_too_large": "client_error",
        "image_too_large": "client_error",
        "unsupported_image": "client_error",
        "invalid_image": "client_error",
        "model_not_found": "client_error",
        "model_not_ready": "failed",
        "overloaded": "overloaded",
        "quota_exceeded": "client_error",
        "deadline_exceeded": "timeout",
        "inference_failed": "failed",
        "model_invalid": "failed",
        "startup_error": "failed",
    }
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ServiceError)}
    found = {}
    for cls in classes - {ServiceError, errors.RequestError}:
        options: dict[str, Any] = {"retry_after_s": 1} if issubclass(cls, Overloaded | QuotaExceeded) else {}
        outcome = outcome_of(cls("a sentence", **options))
        assert found.setdefault(cls.code, outcome) == outcome
    assert expected == found
    assert set(expected.values()) | {"ok"} == set(OUTCOMES)


async def test_only_what_was_answered_or_ran_out_of_time_teaches_the_forecast(
    gate: Gate, service: InferenceService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller who left early, or an image that could not be read, would make the next promises too bold."""
    model = service.registry.get()
    taught: list[float] = []
    monkeypatch.setattr(model.forecast, "learn", lambda _, took_s: taught.append(took_s))
    await classify(service, b"text")
    begun = len(gate.batches)
    with gate.held():
        async with in_background(classify(service, JPEG)) as (left,):
            await gate.began(begun + 1)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
        assert taught == []
        late = LocalRequest([JPEG])
        late.longest_s = 0.01
        with pytest.raises(DeadlineExceeded, match=r"0\.01 s"):
            await service.answer(late)
    (took_s,) = taught
    assert took_s > 0.01
    await classify(service, b"text", JPEG)
    assert len(taught) == 2
