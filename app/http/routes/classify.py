"""POST /v1/classify."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Query, Request, Response

from app.errors import DeadlineExceeded, InvalidRequest, ServiceError
from app.http.dependencies import MetricsDep, ServiceDep, SettingsDep
from app.http.errors import PROBLEM_JSON
from app.http.schemas import ClassifyJson, ClassifyResponse, Problem, answer_body, server_timing
from app.http.uploads import read_upload
from app.log import request_id
from app.service import LoadedModel, outcome_of
from app.types import Prediction

router = APIRouter(tags=["classify"])

DEFAULT_TOP_K = 5
UNKNOWN_MODEL = "unknown"  # the metrics' label of a request that named no model of ours: never the client's own words
T = TypeVar("T")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = {
    "required": True,
    "content": {
        "image/jpeg": _BINARY,
        "image/png": _BINARY,
        "image/webp": _BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                "required": ["images"],
            }
        },
        "application/json": {"schema": ClassifyJson.model_json_schema()},
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": ClassifyResponse, "description": "One result per image, in order; a bad image has an error in its place."},
    **{
        status: {"model": Problem, "description": text, "content": {PROBLEM_JSON: {}}}
        for status, text in {
            404: "No such model or version.",
            413: "Too many bytes, images or pixels.",
            415: "Not one of the accepted image formats.",
            422: "A parameter, the body's form, or a broken image.",
            500: "The model failed.",
            503: "Overloaded; `Retry-After` says when to try again.",
            504: "The time budget ended first.",
        }.items()
    },
}


@router.post(
    "/v1/classify",
    summary="Classify one image or several",
    responses=RESPONSES,
    response_class=Response,
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def classify(
    request: Request,
    service: ServiceDep,
    settings: SettingsDep,
    metrics: MetricsDep,
    model: Annotated[str | None, Query(description="Model to use; unset: the default one.")] = None,
    version: Annotated[int | None, Query(ge=1, description="Version of the model; unset: the highest loaded.")] = None,
    top_k: Annotated[int | None, Query(description="How many classes to answer with; unset: 5, or all if fewer.")] = None,
) -> Response:
    """Send the image as the body (`curl --data-binary @photo.jpg`), one or several as multipart files, or JSON with base64.

    With a single image an error is the answer's status, as problem+json. With several the answer is 200 and each
    image has its own predictions or its own error.
    """
    started = time.perf_counter()
    label, outcome = UNKNOWN_MODEL, "failed"
    try:
        async with asyncio.timeout(settings.http.request_timeout_s):
            with service.admission.admit() as permit:
                upload = await read_upload(
                    request, permit, max_bytes=settings.http.max_upload_bytes, max_images=settings.http.max_images_per_request
                )
                fields = upload.fields
                chosen = service.registry.get(
                    _either("model", model, fields.model), _either("version", version, fields.version)
                )
                label = chosen.manifest.name
                wanted = _either("top_k", top_k, fields.top_k)
                if wanted is None:
                    wanted = min(DEFAULT_TOP_K, chosen.manifest.num_classes)
                good = [image for image in upload.images if isinstance(image, bytes)]
                classified = service.classify(good, permit, model=chosen, top_k=wanted)
                results = iter(await _while_connected(request, classified))
        answers = [next(results) if isinstance(image, bytes) else image for image in upload.images]
        if not upload.several and isinstance(answers[0], ServiceError):
            raise answers[0]
        outcome = "ok"
        return _answer(chosen, answers)
    except TimeoutError as error:
        outcome = "timeout"
        budget = settings.http.request_timeout_s
        raise DeadlineExceeded(f"the request took longer than its time budget of {budget:g} s; try again later") from error
    except ServiceError as error:
        outcome = outcome_of(error)
        raise
    finally:
        metrics.requests.labels(label, outcome).inc()
        metrics.request_duration.labels(label).observe(time.perf_counter() - started)


def _answer(model: LoadedModel, answers: list[Prediction | ServiceError]) -> Response:
    body = {
        "model": model.manifest.name,
        "version": model.manifest.version,
        "variant": model.variant,
        "request_id": request_id.get(),
        "results": [answer_body(answer) for answer in answers],
    }
    predictions = [answer for answer in answers if isinstance(answer, Prediction)]
    headers = {"Server-Timing": server_timing(predictions)} if predictions else None
    return Response(orjson.dumps(body), headers=headers, media_type="application/json")


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work. It is cancelled when the client leaves, so that no batch is computed for nobody.

    Raises:
        InvalidRequest: the client has left.
    """
    task = asyncio.create_task(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise InvalidRequest("the connection was closed before the answer") from None
        raise
    finally:
        watcher.cancel()


def _either(name: str, query: T | None, body: T | None) -> T | None:
    if query is not None and body is not None and query != body:
        raise InvalidRequest(f"{name} is {query} in the query and {body} in the body; say it once")
    return query if query is not None else body
